"""Actors that live and end together: every wait has a deadline, and notices the death of any of
them, asked or not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from kimisys.errors import KimisysError

_SECOND_HAND_SECONDS = 5.0  # how long the death of the true culprit may take to be known

_log = logging.getLogger(__name__)


class ActorLostError(KimisysError):
    """An actor died, or did not answer before its deadline. The message names it."""


class Actor:
    """Base of the classes that `Actors.spawn` takes."""

    async def lifetime(self) -> None:
        """Never returns: the answer to this call is the news of the process' death."""
        await asyncio.Event().wait()

    def close(self) -> None:
        """Give back what the process holds; it ends afterwards."""


class Actors:
    """The actors of a run, by name. One method call at a time runs in each, unless its methods are
    async.

    timeout_seconds: the longest that `wait` waits.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._actors: dict[str, Any] = {}
        self._lifetimes: dict[Any, str] = {}

    @property
    def timeout_seconds(self) -> float:
        """The longest that `wait` waits."""
        return self._timeout

    def spawn(self, name: str, kind: type, environment: Mapping[str, str], *args: Any) -> None:
        """Begin to start `kind(*args)` in a process of its own with `environment` added."""
        remote: Any = ray.remote(kind).options(
            num_cpus=0, max_concurrency=8, runtime_env={"env_vars": dict(environment)}
        )
        self._actors[name] = remote.remote(*args)
        self._lifetimes[self._actors[name].lifetime.remote()] = name

    def begin(self, name: str, method: str, *args: Any) -> Any:
        """Call `method` of an actor; `wait` takes what this returns."""
        return getattr(self._actors[name], method).remote(*args)

    def wait(self, pending: Mapping[str, Any]) -> dict[str, Any]:
        """The results of `pending` (name of the actor → what `begin` returned), all of them.

        Raises ActorLostError naming who died, asked or not, or did not answer in time; what an
        actor's own code raised is raised here as it was raised there.
        """
        names = {reference: name for name, reference in pending.items()}
        done: dict[str, Any] = {}
        deadline = time.monotonic() + self._timeout
        while names:
            left = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait([*names, *self._lifetimes], num_returns=1, timeout=left)
            if not ready:
                late = ", ".join(names.values())
                raise ActorLostError(
                    f"no answer from {late} within {self._timeout:.0f} s; see what it is doing, or "
                    "give it longer (--ready-timeout)"
                )
            name = names.pop(ready[0], None)
            if name is None:
                raise self._lost(ready[0])
            try:
                done[name] = ray.get(ready[0], timeout=max(1.0, left))
            except RayTaskError as error:
                if not isinstance(error.cause, KimisysError):
                    self._blame(error.cause)
                error.cause.add_note(f"raised in {name}")
                raise error.cause from error
            except (RayActorError, GetTimeoutError) as error:
                raise ActorLostError(f"{name} is lost: {_brief(str(error))}") from error
        return {name: done[name] for name in pending}

    def check(self) -> None:
        """Raise ActorLostError, naming who died, if an actor did: for waits that wait for no
        actor's answer."""
        dead, _ = ray.wait([*self._lifetimes], num_returns=1, timeout=0)
        if dead:
            raise self._lost(dead[0])

    async def answer(self, name: str, call: Any, seconds: float | None = None) -> Any:
        """The result of `call`, which `begin` returned for the actor `name`, awaited for `seconds`
        (None: as long as `wait` waits).

        Raises as `wait` does, but knows of this actor's death alone. The call goes on when the
        awaiting is cancelled.
        """
        limit = self._timeout if seconds is None else seconds
        try:
            return await asyncio.wait_for(asyncio.wrap_future(call.future()), limit)
        except RayTaskError as error:
            error.cause.add_note(f"raised in {name}")
            raise error.cause from error
        except RayActorError as error:
            raise ActorLostError(f"{name} is lost: {_brief(str(error))}") from error
        except TimeoutError as error:
            raise ActorLostError(
                f"no answer from {name} within {limit:.0f} s; see what it is doing, or give it "
                "longer (--ready-timeout)"
            ) from error

    def close(self, seconds: float) -> None:
        """End the actors: asked first, killed when they do not answer within `seconds`."""
        closing = {actor.close.remote(): name for name, actor in self._actors.items()}
        deadline = time.monotonic() + seconds
        for reference, name in closing.items():
            try:
                ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            except RayActorError:
                pass  # it has ended
            except Exception as error:  # whatever it is, the process has to end all the same
                _log.warning("%s did not close by itself: %s", name, error)
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._lifetimes = {}, {}

    def _blame(self, seen: BaseException) -> None:
        """Raise ActorLostError if an actor is found dead: what its peer says of it tells less."""
        if not self._lifetimes:
            return
        dead, _ = ray.wait([*self._lifetimes], num_returns=1, timeout=_SECOND_HAND_SECONDS)
        if dead:
            raise self._lost(dead[0]) from seen

    def _lost(self, lifetime: Any) -> ActorLostError:
        name = self._lifetimes[lifetime]
        try:
            ray.get(lifetime, timeout=1.0)
            reason = "its process ended"
        except (RayActorError, GetTimeoutError) as error:
            reason = str(error)
        return ActorLostError(f"{name} is lost: {_brief(reason)}")


def _brief(reason: str) -> str:
    """Ray's account of a death: what was seen, without identifiers and advice."""
    told = reason.partition("Some common causes")[0]
    _, mark, detail = told.partition("Worker exit detail:")
    return " ".join((detail if mark else told).split())


def share(value: Any) -> Any:
    """`value`, stored once for all the actors that it is passed to."""
    return ray.put(value)
