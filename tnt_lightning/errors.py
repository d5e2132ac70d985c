"""A user's mistake: said in one line that names the key or file, the bad value and the cure. Commands print it and exit with 2."""


class UserError(ValueError):
    def __str__(self) -> str:
        # From a loader's worker torch raises it again with the worker's traceback as its message.
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()
