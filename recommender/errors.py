"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in the input: a config, a data file, a bundle, a request.

    The message says what is wrong, where (file, row, field) and what to do. The command line prints it without a
    traceback and exits with status 2.
    """
