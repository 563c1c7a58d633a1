"""Studies that make their own text, on paper: rounds and corpora unfolded, ids, order of the jobs, refusals."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_synth.config.errors import ConfigError
from megatron_synth.config.load import to_yaml
from megatron_synth.study.execute import slurm
from megatron_synth.study.execute.folder import Folder
from megatron_synth.study.plan.corpora import corpora_of, generating, stage_of
from megatron_synth.study.plan.runs import Run, expand, jobs_of, needs_of
from megatron_synth.study.plan.study_file import Study, load_study
from tests.unit.study.test_study_file import TINY, study_of

SYNTHESIS = {
    "template": "configs/synthesis/templates/tiny-continue.yaml",
    "parents": {"natural": {"builtin": "natural", "max_documents": 3}},
    "sampling": {"temperature": 1, "top_p": 1, "max_tokens": 16},
}
CORPUS = {"settings": SYNTHESIS, "max_epochs": float("inf")}


def content_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "sizes": {"s": {"model": TINY}},
        "arms": {"natural": {"web": 1}},
        "grid": [{"tokens": [1024]}],
        "seeds": [1, 2],
    }
    return study_of(folder, **{**base, **changes})


def loaded(folder: Path, **changes: Any) -> tuple[Study, list[Run]]:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content_of(folder, **changes), sort_keys=False))
    study = load_study(file)
    return study, expand(study)


def problems(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, **changes)
    return str(caught.value)


def rounds(**loops: Any) -> dict[str, Any]:
    return {"rounds": {name: {"corpus": CORPUS, **loop} for name, loop in loops.items()}}


def ratios(study: Study, arm: str) -> dict[str, Fraction]:
    return {name: share.ratio for name, share in study.arms[arm].items()}


def test_rounds_become_sources_and_arms_each_once(tmp_path: Path) -> None:
    study, runs = loaded(
        tmp_path,
        **rounds(
            replace={"count": 2},
            accumulate={"count": 2, "protocol": "accumulate"},
            half={"count": 2, "real": "1/2"},
        ),
    )
    half, third = Fraction(1, 2), Fraction(1, 3)
    assert ratios(study, "replace-1") == {"replace-1": 1} and ratios(study, "replace-2") == {"replace-2": 1}
    # the first round's text is the same in all loops, and the first mixture of two of them
    assert study.rounds["half"].arms == ("accumulate-1", "half-2")
    assert ratios(study, "accumulate-1") == {"web": half, "replace-1": half}
    assert ratios(study, "accumulate-2") == {"web": third, "replace-1": third, "accumulate-2": third}
    assert ratios(study, "half-2") == {"web": half, "accumulate-2": half}
    assert len(runs) == 2 * 6 and len(corpora_of(runs)) == 2 * 3
    by_name = {(run.arm, run.seed): run for run in runs}
    (second,) = by_name["replace-2", 2].corpora.values()
    assert second.generator is by_name["replace-1", 2] and second.seed == 2
    assert (stage_of(by_name["natural", 1]), stage_of(second), stage_of(by_name["replace-2", 2])) == (0, 1, 2)
    assert generating(corpora_of(runs)) == {
        by_name[arm, seed].id for arm in ("natural", "replace-1", "accumulate-1") for seed in (1, 2)
    }


def test_jobs_stand_behind_what_they_need(tmp_path: Path) -> None:
    _, runs = loaded(tmp_path, **rounds(replace={"count": 3}))
    jobs = jobs_of(runs)
    assert len({job.id for job in jobs}) == len(jobs) == 2 * (4 + 3)
    for number, job in enumerate(jobs):
        corpora = [need.id for need in needs_of(job)] if isinstance(job, Run) else []
        assert set(corpora) <= {one.id for one in jobs[:number]}, "a run comes behind its corpora"


def test_what_was_unfolded_is_read_back_as_it_is(tmp_path: Path) -> None:
    study, runs = loaded(
        tmp_path,
        **rounds(replace={"count": 2}),
        generated={"drawn": {**CORPUS, "generator": {"arm": "natural", "seed": 1}, "seeds": [7, 8]}},
        arms={"natural": {"web": 1}, "mixed": {"web": "1/2", "drawn": "1/2"}},
        grid=[{"tokens": [1024], "arms": ["natural", "mixed", "replace"]}],
    )
    assert study.copies == {"mixed": ("mixed-7", "mixed-8")} and "drawn" not in study.generated
    assert {run.arm for run in runs} == {"natural", "mixed-7", "mixed-8", "replace-1", "replace-2"}
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(study))
    again = load_study(file)
    assert again == study and [run.id for run in expand(again)] == [run.id for run in runs]
    drawn = {corpus.id for run in runs if run.arm.startswith("mixed") for corpus in run.corpora.values()}
    assert len(drawn) == 2, "one corpus for each seed of it, whatever the seed of the training"


def test_ids_follow_from_what_decides_the_text(tmp_path: Path) -> None:
    def ids(**changes: Any) -> list[str]:
        settings = {**SYNTHESIS, **changes.pop("settings", {})}
        _, runs = loaded(
            tmp_path,
            rounds={changes.pop("name", "loop"): {"corpus": {"settings": settings, "max_epochs": float("inf")}}},
            **changes,
        )
        return [corpus.id for corpus in corpora_of(runs)]

    first = ids()
    assert ids(name="another") == first, "not the name of the source"
    assert ids(settings={"engine": {"batch_size": 4}}) == first, "nor what serves the model"
    assert ids(output=str(tmp_path / "elsewhere")) == first, "nor where the study is"
    assert not set(ids(settings={"filters": {"min_words": 3}})) & set(first)
    assert not set(ids(seeds=[3, 4])) & set(first)
    assert not set(ids(rates={"lr": 2e-2})) & set(first), "another model wrote it"
    elsewhere = [run.id for run in loaded(tmp_path, **rounds(loop={}), output=str(tmp_path / "elsewhere"))[1]]
    assert elsewhere == [run.id for run in loaded(tmp_path, **rounds(loop={}))[1]]


def test_corpora_that_differ_in_filters_share_answers(tmp_path: Path) -> None:
    made = {
        "all": CORPUS,
        "half": {**CORPUS, "settings": {**SYNTHESIS, "filters": {"choice": {"method": "random", "share": "1/2"}}}},
        "hot": {**CORPUS, "settings": {**SYNTHESIS, "sampling": {"temperature": 2, "top_p": 1, "max_tokens": 16}}},
    }
    _, runs = loaded(
        tmp_path,
        generated={name: {**one, "generator": {"arm": "natural"}} for name, one in made.items()},
        arms={"natural": {"web": 1}} | {f"of-{name}": {name: 1} for name in made},
        seeds=[1],
    )
    found = {name: corpus for run in runs for name, corpus in run.corpora.items()}
    assert len({corpus.id for corpus in found.values()}) == 3
    assert found["all"].answers_id == found["half"].answers_id != found["hot"].answers_id


def test_arrays_of_slurm_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, runs = loaded(tmp_path, **rounds(replace={"count": 2}))
    folder, sent = Folder(study.folder), []

    def submitted(spec: Any, commands: list[str], limit: int, after: list[str]) -> str:
        names = [name for pack in sorted((spec.folder / "packs").iterdir()) for name in pack.read_text().split()]
        sent.append((tuple(after), names, len(commands)))
        return str(100 + len(sent))

    monkeypatch.setattr(slurm, "submit_to_queue", submitted)
    assert slurm.submit_array(study, jobs_of(runs), folder, slurm.ArrayOptions(2, 0, None, None, False)) == 0
    assert [after for after, _, _ in sent] == [tuple(str(101 + job) for job in range(before)) for before in range(5)]
    begins = [sorted({name.split("-100")[0].rsplit("-s-", 1)[0] for name in names}) for _, names, _ in sent]
    assert begins[0] == ["natural"] and begins[2] == ["replace-1"] and begins[4] == ["replace-2"]
    assert all(name.startswith("tiny-continue-s") for name in [*sent[1][1], *sent[3][1]])
    assert sorted(name for _, names, _ in sent for name in names) == sorted(job.name for job in jobs_of(runs))


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    arms = {"natural": {"web": 1}, "mixed": {"web": "2/3", "qa": "1/3"}, "staged": {"web": "2/3", "qa": "1/3"}}
    study, runs = loaded(tmp_path, arms=arms, in_order={"staged": ["qa", "web"]}, grid=[{"tokens": [1536]}])
    staged = next(run for run in runs if run.arm == "staged")
    first, second = staged.config.data.phases
    assert (first.tokens, first.ratios, second.tokens, second.ratios) == (512, {"qa": 1}, None, {"web": 1})
    assert all(source.ratio is None for source in staged.config.data.sources.values())
    assert study.share("staged") == study.share("mixed") == Fraction(1, 3)
    assert staged.id != next(run for run in runs if run.arm == "mixed" and run.seed == staged.seed).id
    assert "in_order.staged: name the sources of this arm, each once: web, qa" in problems(
        tmp_path, arms=arms, in_order={"staged": ["qa"]}
    )


def generated(**changes: Any) -> dict[str, Any]:
    return {
        "generated": {"made": {**CORPUS, "generator": {"arm": "natural"}, **changes}},
        "arms": {"natural": {"web": 1}, "mixed": {"web": "1/2", "made": "1/2"}},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (generated(generator={"arm": "natral"}), "generated.made.generator.arm: no arm is called 'natral'"),
        (generated(generator={"arm": "natural", "size": "m"}), "generated.made.generator.size: no size is called 'm'"),
        (generated(generator={"arm": "natural", "seed": 9}), "generated.made.generator.seed: 9 is not among the seeds"),
        (
            generated(generator={"arm": "natural", "tokens": 999}),
            "generated.made.generator: no run of the grid is arm natural at size s on 999 tokens with seed 1: add it",
        ),
        (generated(generator={"arm": "mixed"}), "needs its own text, by way of arms mixed > mixed: name another arm"),
        (generated(generator=None), "generated.made.generator: nothing generates"),
        (
            generated(settings={**SYNTHESIS, "seed": 3}),
            "generated.made.settings.seed: a study decides this by generated.made.seed",
        ),
        (
            generated(settings={**SYNTHESIS, "output": "x"}),
            "generated.made.settings.output: a study decides this by its folder",
        ),
        (generated(settings={**SYNTHESIS, "samplng": {}}), "generated.made.settings.samplng: unknown key"),
        (generated(settings={"kind": "hq-rephras", "parents": SYNTHESIS["parents"]}), "there is no kind 'hq-rephras'"),
        (generated(synthesis="synthesis/none.yaml"), "generated.made.synthesis: no configuration file"),
        (generated(seed=1, seeds=[1, 2]), "generated.made.seeds: give either `seed` or different `seeds`"),
        (rounds(loop={"real": 1}), "rounds.loop.real: leaves no synthetic text; give a share below 1"),
        (rounds(loop={"count": 0}), "rounds.loop.count"),
        (
            rounds(web={}) | {"arms": {"natural": {"web": 1}, "web-1": {"qa": 1}}},
            "makes an arm 'web-1', which is there already",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in problems(tmp_path, **changes)
