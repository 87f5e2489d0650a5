"""The errors a user can meet. Each message is one line that says what to do."""


class ElmLanczosError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line and exits 1."""


class UsageError(ElmLanczosError):
    """An option, a configuration key or an argument that cannot be used as given (exit code 2)."""


class ModelError(ElmLanczosError):
    """A model that cannot be loaded, or whose weights cannot be used."""


class UnsupportedModelError(ModelError):
    """A model that cannot be rewritten exactly as a linear system; the message names the module."""


class StoreError(ElmLanczosError):
    """A result store that cannot be created, resumed or read."""


class DamagedError(StoreError):
    """A part of a result store that is there, but not as it was written."""


class PeerError(ElmLanczosError):
    """Another process of the run has failed and says why; this one only ends (exit code 1)."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says that is not blank; "" if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
