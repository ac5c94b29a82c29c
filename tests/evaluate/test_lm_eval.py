"""One task of lm-evaluation-harness, from a file, on a student: its numbers are those of the logits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from trihybrid.models.checkpoint import load_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'trihybrid[eval]'")

TASK = "trihybrid_local"
# The harness counts spaces at the end of a context to the answer, so none ends in one.
ROWS = [
    {"context": "recall: Qx Wb; Q", "choices": ["x", "b"], "label": 0},
    {"context": "the slow brown", "choices": [" fox", " f", " dog"], "label": 2},
    {"context": "Return a new", "choices": [" list", " set"], "label": 1},
]

# What the harness and the libraries below it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_a_task_from_a_file_scores_what_the_logits_say(micro_run: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    student, tokenizer = (
        load_model(micro_run / "matched"),
        AutoTokenizer.from_pretrained(micro_run / "matched"),
    )
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=student, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu"),
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )

    right = 0
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ROWS, strict=True):
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["context"])["input_ids"]
            ids = torch.tensor([context + tokenizer(choice, add_special_tokens=False)["input_ids"]])
            logs = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]
            scores.append(sum(logs[t - 1, ids[0, t]].item() for t in range(len(context), ids.shape[1])))
        assert [float(answer[0]) for (answer,) in sample["resps"]] == pytest.approx(scores, rel=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == row["label"]
    assert found["results"][TASK]["acc,none"] == pytest.approx(right / len(ROWS))
