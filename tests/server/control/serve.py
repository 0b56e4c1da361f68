"""The control service in a process of its own, to be killed: serve.py SERVER.TOML PORT; writes its port to standard output."""

import asyncio
import sys
from pathlib import Path

from server.control import service
from server.daemon.settings import load
from server.history.store import History


class Registrar:
    async def changed(self):
        pass

    async def seen(self):
        return {}


async def main(config, port):
    settings = load(Path(config))
    settings = settings.model_copy(update={"control": settings.control.model_copy(update={"port": int(port)})})
    with History.open(settings.database) as history:
        running = await service.start(settings, history, Registrar())
        sys.stdout.write(f"{running.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
