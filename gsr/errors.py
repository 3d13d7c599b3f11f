"""The one exception that means "the input is wrong, and this sentence says how to fix it"."""


class InputError(ValueError):
    """Bad input from outside: a file, an option, a config key, an argument.

    The message is one sentence that names the thing at fault and the fix. Command lines print it
    without a traceback and exit with code 2; library callers may catch it as a ValueError.
    """
