"""What the launcher prints once the service is ready: what runs where, and how to call it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nibble.service.broker.errors import BrokerError
from nibble.service.launcher.broker_server import BrokerServer
from nibble.service.launcher.plan import GATEWAY, Model, Plan
from nibble.service.launcher.process import ChildProcess


@dataclass(frozen=True)
class Row:
    """One process. pid None: it was not started here."""

    name: str
    where: str
    pid: int | None


async def process_rows(plan: Plan, broker: BrokerServer, children: Sequence[ChildProcess]) -> list[Row]:
    """The gateway, the workers with the device that they told the broker, and the broker's server."""
    from nibble.service.broker.gateway_side import GatewayBroker  # 0.2 s that the children need not wait for

    connection = GatewayBroker(broker.url, f"launcher-{os.getpid()}", namespace=plan.settings.namespace)
    await connection.start()
    devices: dict[str, str] = {}
    try:
        devices = {worker.worker_id: worker.device for worker in (await connection.status()).workers}
    except BrokerError:
        pass  # the server is just being started again
    finally:
        await connection.close()
    rows = []
    for child in children:
        device = devices.get(child.spec.environment.get("NIBBLE_WORKER_ID", ""), "loading")
        rows.append(Row(child.name, plan.address.url if child.name == GATEWAY else device, child.pid))
    return [*rows, Row("valkey", broker.where, broker.pid)]


def resident_bytes(pid: int) -> int:
    """Memory of a process that is not shared with a file: the model's memory map is not counted."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def ready_banner(plan: Plan, model: Model, rows: Sequence[Row], start_s: float) -> str:
    """Many lines for the terminal."""
    lines = [f"Nibble is ready after {start_s:.1f} s and serves {model.name}", f"  {'model':<10}{model.directory}"]
    width = max(len(row.where) for row in rows)
    for row in rows:
        line = f"  {row.name:<10}{row.where:<{width}}"
        if row.pid is not None:
            line += f"  pid {row.pid:<8}{resident_bytes(row.pid) / 2**20:.0f} MiB"
        lines.append(line)
    return "\n".join([*lines, "", *_examples(plan, model), ""])


def _examples(plan: Plan, model: Model) -> list[str]:
    url = plan.address.url + "/v1"
    key = "YOUR_KEY" if plan.needs_key else "none"
    authorization = f"    -H 'Authorization: Bearer {key}' \\" if plan.needs_key else None
    curl = [
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' \\",
        authorization,
        # A limit, as a small model at temperature 1 may not find an end for minutes
        f"""    -d '{{"model": "{model.name}", "max_tokens": 100, """
        '"messages": [{"role": "user", "content": "Hello!"}]}\'',
    ]
    python = [
        "  from openai import OpenAI",
        f'  client = OpenAI(base_url="{url}", api_key="{key}")',
        f'  answer = client.chat.completions.create(model="{model.name}",',
        '      messages=[{"role": "user", "content": "Hello!"}], max_tokens=100)',
        "  print(answer.choices[0].message.content)",
    ]
    chat = f"  {_command()} chat --url {plan.address.url}"
    return [*(line for line in curl if line), "", *python, "", chat, "", "Ctrl-C stops the service."]


def _command() -> str:
    """How the `nibble` command is called from where the user is."""
    script = Path(sys.executable).with_name("nibble")
    if shutil.which("nibble") is not None:
        return "nibble"
    if not script.exists():
        return f"{sys.executable} -m nibble.cli"
    return min(str(script), os.path.relpath(script), key=len)
