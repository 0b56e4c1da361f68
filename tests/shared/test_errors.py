"""An interrupt can strike inside a library that makes an error of it; it is an interrupt all the same."""

import pytest
from pydantic import BaseModel, field_serializer
from pydantic_core import PydanticSerializationError

from shared.errors import ConfigError, interrupted, let_interrupts_through


class Struck(BaseModel):
    value: int = 1

    @field_serializer("value")
    def serialise(self, _: int) -> str:
        raise KeyboardInterrupt


def struck() -> Exception:
    with pytest.raises(PydanticSerializationError) as caught:
        Struck().model_dump()
    return caught.value


def test_an_interrupt_that_pydantic_has_wrapped_goes_on_as_one():
    assert interrupted(struck())
    with pytest.raises(KeyboardInterrupt):
        let_interrupts_through(struck())


def hide(error: Exception) -> None:
    try:
        raise error
    except PydanticSerializationError:
        raise ConfigError("a line for a person") from None


def test_it_is_found_behind_an_error_that_hides_its_cause():
    with pytest.raises(ConfigError) as caught:
        hide(struck())
    assert interrupted(caught.value)


def test_other_errors_are_none():
    assert not interrupted(None)
    let_interrupts_through(ConfigError("a line for a person"))
