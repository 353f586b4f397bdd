# SPDX-License-Identifier: MIT
"""Several processes under torchrun, on the CPU with gloo and FSDP2: they train as one would, and end together."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import grpo
import ppo
from running import CI, SMALL, command, curves, finish, make_folder, slow, start, steps, weights

# One launch does all that needs several processes and no fault: starting them costs more than what they do.
#   gradients    one step of every case, up to the first update, whose gradient is written down
#   together     4 steps
#   half         2 steps, with which another number of processes goes on
WORK = """
import json, grpo, ppo

cases, common = (json.load(open(name)) for name in ("cases.json", "common.json"))
torch.set_num_threads(1)


class Enough(Exception):
    pass


def work(number):
    for module in (grpo, ppo):
        module.reward = script.reward
        keep = module.optimizer_step
        for name, (only, family, choices) in cases.items():
            if only not in (module.__name__, "both"):
                continue
            gradients = {}

            def record(model, optimizer, max_grad_norm):
                gradients.update({f"{len(gradients)} {n}": module.whole(p.grad) for n, p in model.named_parameters()})
                if hasattr(model, "lm_head"):
                    raise Enough  # the policy is updated last

            module.optimizer_step = record
            try:
                own = dict(model=family, run_name=f"{module.__name__}_{name}_{number}")
                own |= dict(value_warmup_steps=0) if module is ppo else {}
                module.train(module.Args(**common | own | choices))
            except Enough:
                pass
            if module.world()[0] == 0:
                torch.save(gradients, f"{module.__name__}_{name}_{number}.pt")
        module.optimizer_step = keep
        train = dict(common, eval_every=2, **(dict(value_warmup_steps=1) if module is ppo else {}))
        name = module.__name__
        module.train(module.Args(**train, run_name=f"{name}_together_{number}"))
        module.train(module.Args(**train | dict(num_steps=2), run_name=f"{name}_half_{number}"))
        if number == 2:
            module.train(module.Args(**train, run_name=f"{name}_half_1", resume="auto"))


if __name__ == "__main__":
    work(int(os.environ.get("WORLD_SIZE", 1)))
    os._exit(0)  # the steps that were broken off leave FSDP's threads behind
"""
SEVERAL = dict(micro_batch_tokens=30)  # a prompt and two completions have up to 18
CASES = {
    "several": ("both", "model", SEVERAL),
    "one_micro_batch": ("both", "model", {}),
    "odd": ("both", "model", SEVERAL | dict(num_prompts=5)),
    "odd_alone": ("both", "model", dict(num_prompts=5, micro_batch_tokens=1, share_prompt=False)),
    "odd_checkpointing": ("both", "model", SEVERAL | dict(num_prompts=5, gradient_checkpointing=True)),
    "token": ("both", "model", SEVERAL | dict(num_prompts=3, loss_average="token")),
    "constant": ("both", "gpt2", SEVERAL | dict(num_prompts=3, loss_average="constant")),
    "few_teach": ("grpo", "model", SEVERAL | dict(num_prompts=3, beta=0.0)),
    "none_teaches": ("grpo", "model", SEVERAL | dict(num_prompts=3, beta=0.0, max_new_tokens=1)),
    "no_kl": ("ppo", "model", SEVERAL | dict(num_prompts=3, beta=0.0)),
    "minibatches": ("both", "model", SEVERAL | dict(num_prompts=6, num_minibatches=2)),
}
# Many pay alike here, so that groups without a signal are left out.
REWARD = "script.reward = lambda completion, answer: float(len(completion) > 1 and '1' in completion)"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """The folder in which one process and two have done the same."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder, "gpt2")
        (folder / "model").rename("gpt2")
        make_folder(folder)
        (folder / "cases.json").write_text(json.dumps(CASES))
        held_out = (folder / "data.jsonl").read_text().splitlines(keepends=True)[:13]  # one more than in a batch
        (folder / "held_out.jsonl").write_text("".join(held_out))
        common = SMALL | dict(num_prompts=3, group_size=4, micro_batch_tokens=40, update_epochs=2, num_minibatches=1)
        common["eval_data"] = "held_out.jsonl"
        (folder / "common.json").write_text(json.dumps(common))
        for processes in (0, 2, 3) if CI else (0, 2):
            run = command("grpo", REWARD + WORK, processes=processes)
            finish(start(run[: 1 + next(i for i, part in enumerate(run) if part.startswith("driver"))]))
        for module in (grpo, ppo):
            patch.setattr(module, "reward", lambda completion, answer: float(len(completion) > 1 and "1" in completion))
            own = dict(value_warmup_steps=1) if module is ppo else {}
            args = common | own | dict(eval_every=2, run_name=f"{module.__name__}_half_2", resume="auto")
            module.train(module.Args(**args))
    return folder


@pytest.fixture
def there(found, monkeypatch):
    monkeypatch.chdir(found)


both = pytest.mark.parametrize("name", ["grpo", "ppo"])


@both
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=slow)])
def test_the_gradient_is_that_of_one_process(there, name, case, processes):
    if CASES[case][0] not in (name, "both"):
        pytest.skip("has no such case")
    one, all_of_them = (torch.load(f"{name}_{case}_{number}.pt", weights_only=True) for number in (1, processes))
    assert one.keys() == all_of_them.keys()
    assert bool(one) == (case != "none_teaches")
    largest = max((gradient.abs().max() for gradient in one.values()), default=1.0)
    for parameter, gradient in one.items():
        torch.testing.assert_close(all_of_them[parameter], gradient, rtol=1e-5, atol=1e-5 * float(largest))


def assert_trained_alike(first: str, second: str) -> None:
    before, first, second = weights("model"), weights(first), weights(second)
    for name, value in first.items():
        assert (value - before[name]).abs().max() > 1e-3, name
        # Where a gradient is 0 but for rounding, AdamW's step is its sign.
        assert ((second[name] - value).abs() > 1e-5).float().mean() < 0.02, name


@both
def test_training_goes_as_in_one_process(there, name):
    assert_trained_alike(f"runs/{name}_together_1/policy", f"runs/{name}_together_2/policy")
    one, two = curves(f"{name}_together_1"), curves(f"{name}_together_2")
    assert one.keys() == two.keys()
    for tag, points in one.items():
        assert [step for step, _ in points] == [step for step, _ in two[tag]]
        assert [value for _, value in two[tag]] == pytest.approx([value for _, value in points], rel=1e-3, abs=1e-4)


@both
def test_it_is_logged_evaluated_and_saved_once(there, name):
    assert len(list(Path(f"runs/{name}_together_2").glob("events*"))) == 1
    assert [step for step, _ in curves(f"{name}_together_2")["reward/mean"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves(f"{name}_together_2")["eval/accuracy"]] == [0, 2, 4]
    assert steps(f"{name}_together_2") == ["step_000004"]
    config = json.loads(Path(f"runs/{name}_together_2/policy/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    files = {path.name for path in Path(f"runs/{name}_together_1/policy").iterdir()}
    assert {path.name for path in Path(f"runs/{name}_together_2/policy").iterdir()} == files


@both
@pytest.mark.parametrize("began", [1, 2])
def test_another_number_of_processes_goes_on(there, name, began):
    assert steps(f"{name}_half_{began}") == ["step_000002", "step_000004"]
    whole, parts = curves(f"{name}_together_1"), curves(f"{name}_half_{began}")
    for tag, points in whole.items():
        if tag.startswith("eval"):  # the first part ended with an evaluation at step 2
            continue
        assert [step for step, _ in points] == [step for step, _ in parts[tag]], tag
        assert [value for _, value in parts[tag]] == pytest.approx([value for _, value in points], rel=1e-3, abs=1e-4)
    assert_trained_alike(f"runs/{name}_together_1/policy", f"runs/{name}_half_{began}/policy")


# ----- They end together -----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


RANK = "int(os.environ['RANK'])"
FAILS = {
    # One of them finds a reward that is no number: all keep what was learned.
    "reward": f"""
import itertools
calls, good = itertools.count(), script.reward
script.reward = lambda *texts: None if {RANK} == 1 and next(calls) == 10 else good(*texts)
""",
    # One of them fails in another way, or is killed: the others do not wait for it for ever.
    "raises": f"""
update = script.optimizer_step
def step(*args):
    if {RANK} == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return update(*args)
script.optimizer_step = step
""",
    "killed": f"""
update = script.optimizer_step
def step(*args):
    if {RANK} == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
script.optimizer_step = step
""",
}


FAILURES = [("grpo", "reward"), ("grpo", "raises"), ("grpo", "killed"), ("ppo", "reward"), ("ppo", "raises")]
FAILURES[1:] = [pytest.param(*failure, marks=slow) for failure in FAILURES[1:]]


@pytest.mark.parametrize(("name", "fails"), FAILURES)
def test_when_one_process_fails_all_end(folder, name, fails):
    began = time.monotonic()
    said = finish(start(command(name, FAILS[fails], processes=2, run_name="a")), code=1)
    assert time.monotonic() - began < 150
    if fails == "reward":  # 8 completions a step, half of them for each process: the third step
        assert "the reward raised TypeError" in said
        assert steps("a") == ["step_000002"]
        assert "2 steps are kept: go on with --run-name a --resume auto" in said
    if fails == "raises":
        assert "--micro-batch-tokens" in said


SLOW = "script.reward = lambda completion, answer: time.sleep(0.05) or len(set(completion)) / 10"


@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=slow)])
def test_sigterm_to_torchrun_finishes_the_step_and_saves(folder, name):
    with start(command(name, SLOW, processes=2, run_name="a", num_steps=1000, save_every=1)) as process:
        while not steps("a"):
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=100)
    assert "finishing this step, then saving" in said
    assert "to go on: the same command with --run-name a --resume auto" in said
    kept = steps("a")[-1]
    assert torch.load(f"runs/a/{kept}/state.pt", weights_only=True)["step"] == int(kept[5:])
    assert weights("runs/a/policy")
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(1, int(kept[5:]) + 1)]


@slow
def test_two_hosts_train_together(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    run = command("grpo", processes=1, run_name="a", num_steps=2, eval_every=1)
    hosts = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    run = [part for part in run if part != "--standalone"]
    run[3:3] = hosts
    first, second = start(run), start(run)
    said = finish(first) + finish(second)
    assert "in 2 processes" in said
    assert said.count("trained model: runs/a/policy") == 1
    assert [step for step, _ in curves("a")["eval/accuracy"]] == [0, 1, 2]
