"""The exceptions of the project, from the most general to the most special.

    HealError
    +-- SpecError        a model spec that cannot be used (field, expectation, value)
    +-- DataError        a dataset that does not fit the spec
    +-- StorageError     the storage URI is unreachable, read-only, full or holds broken bytes
    |   +-- AlreadyExists    create-if-absent found the key taken
    |   +-- NotFound         the key is not there
    +-- IntegrityError   bytes whose digest, signature or chain does not verify
    +-- AdapterError     an adapter that does not fit its base
    +-- RequestError     a request that breaks the protocol; carries the HTTP status
    +-- ServiceError     the running service cannot do what was asked (message says why)

Messages give rule, value and remedy. They never carry inputs.
"""


class HealError(Exception):
    """Base of all errors that a user can cause or mend."""


class SpecError(HealError):
    """A model spec that cannot be used."""


class DataError(HealError):
    """A dataset that does not fit the spec."""


class StorageError(HealError):
    """The storage URI cannot do what is needed."""


class AlreadyExists(StorageError):
    """Create-if-absent found the key taken."""


class NotFound(StorageError):
    """The key is not on the storage."""


class IntegrityError(HealError):
    """Bytes that do not verify."""


class AdapterError(HealError):
    """An adapter that does not fit its base."""


class RequestError(HealError):
    """A request that breaks the protocol.

    Args:
        message: what is wrong: field, expectation, value.
        status: the HTTP status to answer with.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ServiceError(HealError):
    """The running service cannot do what was asked."""
