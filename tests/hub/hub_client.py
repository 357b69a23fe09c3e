"""The tests' end of the driver process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


class Refused(Exception):
    """An error of the driver: `kind` is its class, `foreign` for one that is not ours."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Client:
    """The driver process; everything that it ever printed or answered is in `said`."""

    def __init__(self, address: str, home: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.environment = {
            **kept,
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        self._errors = (home / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_HERE / "driver.py")],
            env=self.environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._said: list[str] = []

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, args, options]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.said
        self._said.append(line)
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["kind"], answer["error"])
        return answer["value"]

    @property
    def said(self) -> str:
        self._errors.flush()
        return "".join(self._said) + Path(self._errors.name).read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._errors.close()
