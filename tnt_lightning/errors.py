"""A user's mistake: said in one line that names the key or file, the bad value and the cure. Commands print it and exit with 2."""


class UserError(ValueError):
    pass
