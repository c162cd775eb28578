"""AsyncLLMEngine: what each caller gets is what it would get alone, whatever others do."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from nanocupy import LLM, AsyncLLMEngine, RequestPriority, SamplingParams
from nanocupy.errors import CheckpointError, CudaError, RequestError
from nanocupy.exporters.nanoinfer2 import write_nanoinfer2
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cli.test_cli_generate import TEMPLATE, byte_tokenizer
from tests.engine.test_failures import damaged

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("async") / "tiny.nano"
    config = tiny_config(vocab_size=260, max_context=256, bos_id=256, eos_ids=(258,))
    checkpoint = TinyCheckpoint(config, tokenizer=byte_tokenizer(), chat_template=TEMPLATE)
    write_nanoinfer2(checkpoint, path)
    return path


def make_llm(model):
    return LLM(model, device="cpu", max_num_seqs=8, policy="priority")


def test_many_at_once_are_each_as_alone(model):
    prompts = [f"prompt {n}" * (n % 4 + 1) for n in range(20)]
    alone = [make_llm(model).generate(p, PARAMS).text for p in prompts]

    async def main():
        async with AsyncLLMEngine(make_llm(model)) as engine:
            answers = [
                engine.generate(p, PARAMS, RequestPriority(level=n % 3))
                for n, p in enumerate(prompts)
            ]
            return [answer.text for answer in await asyncio.gather(*answers)]

    assert asyncio.run(main()) == alone


def test_streams_and_conversations(model):
    messages = [{"role": "user", "content": "Hi"}]
    whole = make_llm(model).chat(messages, PARAMS).text

    async def main():
        async with AsyncLLMEngine(make_llm(model)) as engine:
            return [chunk async for chunk in engine.stream(messages, PARAMS)]

    chunks = asyncio.run(main())
    assert "".join(chunk.text for chunk in chunks) == whole
    assert chunks[-1].finish_reason == "length"


def test_one_callers_mistake_is_its_own(model):
    alone = make_llm(model).generate("good", PARAMS).text

    async def main():
        async with AsyncLLMEngine(make_llm(model)) as engine:
            good = asyncio.create_task(engine.generate("good", PARAMS))
            with pytest.raises(RequestError, match="context"):
                await engine.generate("x" * 300, PARAMS)
            with pytest.raises(RequestError, match="token id 999"):
                await engine.generate([999], PARAMS)
            left = engine.stream("left early", PARAMS)
            async for _ in left:
                break
            await left.aclose()
            cancelled = asyncio.create_task(engine.generate("cancelled", PARAMS))
            await asyncio.sleep(0.01)
            cancelled.cancel()
            text = (await good).text
            # What was left and cancelled is gone from the engine too.
            await asyncio.wrap_future(engine.call(lambda: None))
            unfinished = await asyncio.wrap_future(
                engine.call(lambda: list(engine.llm._engine._requests))
            )
            return text, unfinished

    assert asyncio.run(main()) == (alone, [])


def test_a_listener_that_raises_ends_its_request_alone(model):
    engine = AsyncLLMEngine(make_llm(model))
    alone = make_llm(model).generate("fine", PARAMS).text
    pieces: list[str] = []
    done = threading.Event()

    def bad(event):
        raise ValueError("mine")

    def good(event):
        if event is None:
            done.set()
        else:
            pieces.append(event.text)

    engine.submit("bad", PARAMS, None, bad).result(10)
    engine.submit("fine", PARAMS, None, good).result(10)
    assert done.wait(10)
    engine.close()
    assert "".join(pieces) == alone


def test_adding_and_aborting_from_many_threads(model):
    engine = AsyncLLMEngine(make_llm(model))
    expected = {p: make_llm(model).generate(p, PARAMS).text for p in ("a", "bb", "ccc")}
    failures: list[str] = []

    def client(seed: int) -> None:
        for turn in range(6):
            prompt = list(expected)[(seed + turn) % 3]
            pieces: list[str] = []
            done = threading.Event()

            def listen(event, pieces=pieces, done=done):
                if event is None:
                    done.set()
                else:
                    pieces.append(event.text)

            answer = engine.submit(prompt, PARAMS, None, listen).result(20)
            if (seed + turn) % 4 == 0:
                engine.abort(answer)
            elif not done.wait(20) or "".join(pieces) != expected[prompt]:
                failures.append(f"{prompt}: {pieces}")

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool = engine.llm._engine.pool
    engine.call(pool.check_integrity).result(10)
    engine.close()
    assert failures == []


def test_a_lost_device_tells_everyone(model, monkeypatch):
    llm = make_llm(model)

    async def main():
        engine = AsyncLLMEngine(llm)
        waiting = [asyncio.create_task(engine.generate(p, PARAMS)) for p in ("a", "b")]
        await asyncio.sleep(0)

        def lost(schedule):
            raise CudaError("the GPU's context is gone")

        engine.call(lambda: monkeypatch.setattr(llm._engine.runner, "launch", lost))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        late = await asyncio.gather(engine.generate("c", PARAMS), return_exceptions=True)
        await asyncio.to_thread(engine.close)
        return [*results, *late]

    results = asyncio.run(main())
    assert all(isinstance(r, CudaError) and "context is gone" in str(r) for r in results)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_answer_without_numbers_is_one_callers_error(model):
    params = PARAMS.with_(logit_bias={33: -100.0})
    fine = make_llm(model).generate("fine", params).text
    llm = make_llm(model)
    llm._engine.runner.weights = damaged(llm._engine.runner.weights, ord("!"))

    async def read(engine):
        return [chunk async for chunk in engine.stream("bad!", params)]

    async def main():
        async with AsyncLLMEngine(llm) as engine:
            return await asyncio.gather(
                engine.generate("bad!", params), engine.generate("fine", params), read(engine),
                return_exceptions=True,
            )  # fmt: skip

    bad, good, streamed = asyncio.run(main())
    assert good.text == fine
    for error in (bad, streamed):
        assert isinstance(error, CheckpointError)
        assert "NaN" in str(error)


def test_samples_are_those_of_the_llm(model):
    params = PARAMS.with_(temperature=1.2, seed=3, n=3, logprobs=1)
    alone = make_llm(model).generate("Hi", params)

    async def main():
        async with AsyncLLMEngine(make_llm(model)) as engine:
            whole = asyncio.create_task(engine.generate("Hi", params))
            texts = ["", "", ""]
            async for chunk in engine.stream("Hi", params):
                texts[chunk.sample_index] += chunk.text
            return (await whole).texts, texts

    assert asyncio.run(main()) == (alone.texts, alone.texts)


def test_closing_ends_what_waits(model, monkeypatch):
    llm = make_llm(model)
    launch = llm._engine.runner.launch

    def slow(schedule):
        time.sleep(0.01)
        return launch(schedule)

    monkeypatch.setattr(llm._engine.runner, "launch", slow)

    async def main():
        engine = AsyncLLMEngine(llm)
        long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        waiting = asyncio.create_task(engine.generate("a", long))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RequestError, match="closed"):
            await waiting
        with pytest.raises(RequestError, match="closed"):
            await engine.generate("b", PARAMS)

    asyncio.run(main())


def test_settings_change_between_steps(model):
    async def main():
        async with AsyncLLMEngine(make_llm(model)) as engine:
            await asyncio.wrap_future(engine.call(lambda: engine.llm.configure(batch_size=1)))
            return (await engine.generate("a", PARAMS)).text

    assert asyncio.run(main()) == make_llm(model).generate("a", PARAMS).text


def test_a_task_cancelled_while_its_request_is_added_leaves_nothing(model):
    async def main():
        llm = make_llm(model)
        adding, go_on = threading.Event(), threading.Event()
        add = llm.stream

        def slow(*args):
            adding.set()
            assert go_on.wait(30)
            return add(*args)

        llm.stream = slow
        async with AsyncLLMEngine(llm) as engine:
            task = asyncio.create_task(engine.generate("prompt", PARAMS.with_(max_tokens=200)))
            await asyncio.to_thread(adding.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await asyncio.wrap_future(engine.call(lambda: None))
            await asyncio.wrap_future(engine.call(lambda: None))
            return await asyncio.wrap_future(
                engine.call(lambda: (len(engine._listeners), llm._engine.has_unfinished))
            )

    num_listeners, has_unfinished = asyncio.run(main())
    assert num_listeners == 0
    assert not has_unfinished
