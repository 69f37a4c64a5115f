"""What a user can get wrong: one sentence each, shown without a traceback, exit code 2."""


class UsageError(ValueError):
    """A setting, a name or a file that kvsim cannot work with; the message is one line and names it."""


class MissingExtraError(UsageError):
    """Something asked for needs a package that an extra of this distribution brings."""

    def __init__(self, what: str, extra: str) -> None:
        """Name what was asked for and the extra that brings it."""
        super().__init__(f"{what} needs the extra '{extra}': pip install 'kvcore[{extra}]'")
