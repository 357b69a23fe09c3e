"""A tiny talking sketch with two tasks, and clients of a server of it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import sketchconv
from sketchconv.deltas import create

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}{{ m.role }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def _adapters() -> Any:
    """The makers of the adapters' tests; conftest files cannot be imported by name."""
    path = Path(__file__).parent.parent / "adapters" / "conftest.py"
    spec = importlib.util.spec_from_file_location("adapter_makers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_MAKERS = _adapters()


def _tokenizer(folder: Path) -> dict[str, bytes]:
    """Files of a tokenizer of the words w0 to w150."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(151)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE)
    made.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """Paths of a sketch and of two deltas of it: `base`, `one`, `two`."""
    where = tmp_path_factory.mktemp("talker")
    makers = _MAKERS._MAKERS
    model = makers.build("LlamaForCausalLM", eos_token_id=None, max_position_embeddings=128)
    base = where / "talker.sktch"
    makers.write(model, base, files=_tokenizer(where / "tokenizer"))
    paths = {"base": base}
    loaded = sketchconv.load(base)
    for number, name in enumerate(("one", "two")):
        paths[name] = where / f"{name}.sktch"
        create(base, _MAKERS.luts_of(loaded, number), paths[name])
    return paths


@pytest.fixture(scope="session")
def alone(talker):
    """`alone(name, words, count)`: the greedy words of one task, by transformers' `generate`."""
    model, tokenizer = sketchconv.load(talker["base"]), sketchconv.load_tokenizer(talker["base"])
    for name in ("one", "two"):
        model.load_adapter(talker[name], name)

    def run(name: str, prompt: str, count: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        chosen = "__base__" if name == "talker" else name
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, adapter_names=[chosen], **options)
        return tokenizer.decode(made[0, ids.shape[1] :])

    return run


@pytest.fixture
def service(talker):
    """`service(**limits)`: what the server serves; closed after the test."""
    from sketchconv.serving.run import open_service
    from sketchconv.serving.service import Limits

    made = []

    def build(**limits: Any) -> Any:
        deltas = {name: str(talker[name]) for name in ("one", "two")}
        made.append(open_service(talker["base"], deltas, Limits(**limits)))
        return made[-1]

    yield build
    for each in made:
        each.engine.close()


@pytest.fixture
def talk(service):
    """`with talk(key, **limits) as call`: `call(method, path, **options)` of an HTTP client."""
    pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    from sketchconv.serving.app import make_app

    @contextmanager
    def client(key: str | None = None, **limits: Any) -> Any:
        app = make_app(service(**limits), key)

        async def request(method: str, path: str, **options: Any) -> Any:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                return await http.request(method, path, **options)

        def call(method: str, path: str, **options: Any) -> Any:
            return asyncio.run(request(method, path, **options))

        def many(calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
            async def gather() -> list[Any]:
                return await asyncio.gather(*(request("POST", p, json=b) for p, b in calls))

            return asyncio.run(gather())

        call.many = many  # type: ignore[attr-defined]
        yield call

    return client


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
