"""The exception tree: every error that a person can cause or must read.

A message names the setting, its value, the limit and the remedy, in one line. The command line
prints it and exits with the class's `exit_code`; anything else that escapes is a bug and shows its
traceback.
"""


class MoonflowerError(Exception):
    """Base of all errors of this project. Its message is meant for a person."""

    exit_code = 1


class ConfigError(MoonflowerError):
    """A setting is unknown, of the wrong type, out of range or at odds with another."""

    exit_code = 2


class DataError(MoonflowerError):
    """A data set cannot be fetched or read, or a row of it breaks its declaration.

    Its message may quote a row number, so at a site it stays at the site: what travels is that the data
    was refused, and no more.
    """

    exit_code = 2


class ModelError(MoonflowerError):
    """A model cannot be loaded, is not the declared one, or cannot be trained as asked."""

    exit_code = 2


class DatabaseError(MoonflowerError):
    """The history's database cannot be reached, or its schema is not this version's."""

    exit_code = 2


class DatabaseAwayError(DatabaseError):
    """The database does not answer, or cannot write, for now: the same call may work later."""


class NotFoundError(MoonflowerError):
    """A run, a round or a checkpoint that was asked for does not exist."""

    exit_code = 2


class RunFailedError(MoonflowerError):
    """A run stopped before its last round; what it has committed stays and can be resumed."""


class MachineError(RunFailedError):
    """The machine's fault and not the run's: a full disk, a lost connection. The next attempt may go on."""


class RefusedError(MoonflowerError):
    """A site will not do what was asked. The message says which limit, and by how much."""


class PolicyError(RefusedError):
    """The request goes beyond what the site's own policy or remaining budget allows."""


class BudgetError(PolicyError):
    """The dataset's privacy budget has no room for what was asked: it is spent, or reserved by others."""


class RetryError(RefusedError):
    """A request was answered before with another content, or a later one has superseded it."""


class EngineError(MoonflowerError):
    """The gradients of a site's own records could not be had. It may depend on who was drawn, so its text stays there."""


class SensitivityError(RefusedError):
    """The probe found that a record could contribute more than the clipping norm."""


class Fault(ValueError):
    """What is wrong with a value of a record, as the end of a sentence that begins with its column."""


def interrupted(error: BaseException | None) -> bool:
    """Whether an error is a person's interrupt, or what a library made of one that struck inside it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def let_interrupts_through(error: BaseException) -> None:
    """Go on with an interrupt that struck inside a library: for wherever every other error is answered.

    Raises
    ------
    KeyboardInterrupt
        Where `error` stems from one.
    """
    if interrupted(error):
        raise KeyboardInterrupt from error
