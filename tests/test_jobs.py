"""What `fourbit quantize` does with and without names."""

from __future__ import annotations

import pytest

from convert.jobs import jobs_in_home
from convert.manifest import Record, write_manifest
from engine.errors import RegistryError
from engine.home import checkpoint_folder, model_file
from engine.registry import checkpoints, models

KEYS = list(checkpoints())


def keys_of(jobs):
    return [job.folder.name for job in jobs]


def put_checkpoint(key):
    folder = checkpoint_folder(models()[key])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.usefixtures("fourbit_home")
class TestJobs:
    def test_nothing_at_hand_means_all_models_fetched(self):
        jobs = jobs_in_home([], "Q4_K_M", False)
        assert keys_of(jobs) == KEYS
        assert all(job.missing for job in jobs)

    def test_one_checkpoint_at_hand_means_that_one(self):
        put_checkpoint(KEYS[1])
        jobs = jobs_in_home([], "Q4_K_M", False)
        assert keys_of(jobs) == [KEYS[1]]
        assert jobs[0].missing is None

    def test_a_name_means_that_model(self):
        put_checkpoint(KEYS[1])
        (job,) = jobs_in_home([KEYS[2]], "Q4_K_M", False)
        assert job.missing is models()[KEYS[2]]

    def test_half_a_fetch_goes_on(self):
        folder = put_checkpoint(KEYS[0])
        write_manifest(folder, {"config.json": Record("config.json", 5, None, None, "modelscope", "master")})
        (job,) = jobs_in_home([], "Q4_K_M", False)
        assert job.missing is models()[KEYS[0]]

    def test_a_quantized_model_is_done_unless_forced(self):
        out = model_file(models()[KEYS[0]], "Q4_K_M")
        out.parent.mkdir(parents=True)
        out.write_bytes(b"x")
        assert jobs_in_home([], "Q4_K_M", False)[0].is_done
        assert not jobs_in_home([], "Q4_K_M", True)[0].is_done

    def test_an_unknown_name(self):
        with pytest.raises(RegistryError, match="nothing-7b"):
            jobs_in_home(["nothing-7b"], "Q4_K_M", False)
