import pytest

from kimisys import _core, errors

# In the order of ErrorCode in csrc/base/error.h.
CLASSES = [
    errors.LayoutError,
    errors.PlanError,
    errors.BufferMismatchError,
    errors.SnapshotError,
    errors.VersionError,
    errors.DigestError,
    errors.NotFiniteError,
    errors.SchedulerError,
]


@pytest.mark.parametrize(("code", "kind"), list(enumerate(CLASSES)))
def test_each_error_code_becomes_its_exception(code: int, kind: type[errors.KimisysError]) -> None:
    with pytest.raises(errors.KimisysError, match="what, where, remedy") as error:
        _core.raise_error(code, "what, where, remedy")
    assert type(error.value) is kind
    assert kind.__doc__
    assert (kind.__module__, kind.__name__) == ("kimisys.errors", error.type.__name__)


def test_all_errors_have_one_base() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.KimisysError)
        assert kind.__module__ == "kimisys.errors"
    assert errors.KimisysError.__bases__ == (Exception,)


def test_there_is_no_code_without_a_class() -> None:
    with pytest.raises(RuntimeError) as error:
        _core.raise_error(len(CLASSES), "beyond")
    assert not isinstance(error.value, errors.KimisysError)
