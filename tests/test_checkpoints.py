"""Checkpoints: whole or invisible, the newest good one restored, the right ones kept."""

import contextlib
import os
import pathlib
import re
import resource
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pretraining import files
from pretraining.checkpoints import Checkpoints
from pretraining.errors import InputError
from tests.gcs_server import gcs  # noqa: F401

SHAPES = [(40, 30), (7,), (), (64, 16)]
DATA, INDEX = "ckpt-{}.data-00000-of-00001", "ckpt-{}.index"


def values_of(step):
    return [np.random.default_rng([step, i]).normal(size=s) for i, s in enumerate(SHAPES)]


def state_of(step, shapes=SHAPES, dtype=tf.float32):
    """A state whose every value is a function of the step."""
    names = {f"v{i}": tf.Variable(tf.zeros(s, dtype)) for i, s in enumerate(shapes)}
    state = tf.train.Checkpoint(**names, step=tf.Variable(0, dtype=tf.int64))
    if shapes == SHAPES:
        set_step(state, step)
    return state


def set_step(state, step):
    state.step.assign(step)
    for i, value in enumerate(values_of(step)):
        getattr(state, f"v{i}").assign(value)


def assert_is(state, step):
    assert int(state.step) == step
    for i, value in enumerate(values_of(step)):
        np.testing.assert_array_equal(getattr(state, f"v{i}"), value.astype(np.float32))


def saved(folder, steps, keep=3, every=0):
    state = state_of(0)
    checkpoints = Checkpoints(str(folder), state, keep=keep, keep_every_steps=every)
    for step in steps:
        set_step(state, step)
        assert checkpoints.save(step) == f"{folder}/ckpt-{step}" == checkpoints.newest
    return checkpoints


def restored(folder, **arguments):
    """Restores into a fresh state, as a new process would."""
    state = state_of(999)
    path = Checkpoints(str(folder), state, keep=3).restore(**arguments)
    return state, path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def both_of(*steps):
    return sorted(["checkpoint"] + [kind.format(n) for n in steps for kind in (DATA, INDEX)])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def truncate(path, size):
    os.truncate(path, size)


def test_the_newest_is_restored_and_the_last_and_every_so_many_are_kept(tmp_path):
    folder = tmp_path / "deep" / "checkpoints"
    assert restored(folder)[1] is None and not folder.exists()
    checkpoints = saved(folder, [3, 6, 9, 12, 15, 100, 103], keep=2, every=6)
    assert sorted(os.listdir(folder)) == both_of(6, 12, 100, 103)
    assert tf.train.latest_checkpoint(str(folder)) == f"{folder}/ckpt-103"
    listed = tf.train.get_checkpoint_state(str(folder)).all_model_checkpoint_paths
    assert [path.rsplit("-")[-1] for path in listed] == ["6", "12", "100", "103"]
    before = contents(folder)
    assert checkpoints.save(103) == f"{folder}/ckpt-103"
    state, path = restored(folder)
    assert path == f"{folder}/ckpt-103"  # by number: "12" is the greater text
    assert_is(state, 103)
    assert contents(folder) == before
    assert sorted(tf.train.load_checkpoint(path).get_variable_to_shape_map()) == sorted(
        ["_CHECKPOINTABLE_OBJECT_GRAPH"]
        + [f"{name}/.ATTRIBUTES/VARIABLE_VALUE" for name in ("step", "v0", "v1", "v2", "v3")]
    )
    # A folder can be moved; and the file `checkpoint` is written, never read.
    moved = folder.rename(tmp_path / "moved")
    assert tf.train.latest_checkpoint(str(moved)) == f"{moved}/ckpt-103"
    for damage in (b"", b"garbage", b'model_checkpoint_path: "ckpt-6"\n', None):
        (moved / "checkpoint").unlink()
        if damage is not None:
            (moved / "checkpoint").write_bytes(damage)
        assert Checkpoints(str(moved), state_of(0), keep=1).newest == f"{moved}/ckpt-103"
        assert restored(moved, read_only=True)[1] == f"{moved}/ckpt-103"
        assert (contents(moved).get("checkpoint")) == damage
        assert restored(moved)[1] == f"{moved}/ckpt-103"
        assert contents(moved) == before


DAMAGES = {
    "data truncated": lambda f: truncate(f / DATA.format(9), 3000),
    "data lack a byte": lambda f: truncate(f / DATA.format(9), os.path.getsize(f / DATA.format(9)) - 1),
    "data empty": lambda f: truncate(f / DATA.format(9), 0),
    "data missing": lambda f: (f / DATA.format(9)).unlink(),
    "data flipped at the front": lambda f: flip(f / DATA.format(9), 5),
    "data flipped at the end": lambda f: flip(f / DATA.format(9), -3),
    "data those of another step": lambda f: shutil.copy(f / DATA.format(6), f / DATA.format(9)),
    "index truncated": lambda f: truncate(f / INDEX.format(9), 100),
    "index empty": lambda f: truncate(f / INDEX.format(9), 0),
    "index flipped at the front": lambda f: flip(f / INDEX.format(9), 20),
    "index flipped at the end": lambda f: flip(f / INDEX.format(9), -2),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, damage):
    saved(tmp_path, [3, 6, 9])
    DAMAGES[damage](tmp_path)
    before = contents(tmp_path)
    state, path = restored(tmp_path)
    assert path == f"{tmp_path}/ckpt-6"
    assert_is(state, 6)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and re.fullmatch(rf"{tmp_path}/ckpt-9 is damaged \(.+\)\..+", told[0])
    assert tf.train.latest_checkpoint(str(tmp_path)) == path
    before["checkpoint"] = contents(tmp_path)["checkpoint"]
    assert contents(tmp_path) == before
    # The run makes it anew.
    checkpoints = Checkpoints(str(tmp_path), state, keep=2)
    checkpoints.restore()
    set_step(state, 8)
    checkpoints.save(8)  # the damaged one, not there yet, does not count among the two
    assert {INDEX.format(6), INDEX.format(8)} <= contents(tmp_path).keys()
    set_step(state, 9)
    checkpoints.save(9)
    state, path = restored(tmp_path)
    assert path == f"{tmp_path}/ckpt-9" == tf.train.latest_checkpoint(str(tmp_path))
    assert_is(state, 9)
    assert sorted(os.listdir(tmp_path)) == both_of(8, 9)


def test_nothing_of_a_damaged_checkpoint_is_left_wherever_it_is_damaged(tmp_path):
    saved(tmp_path, [6, 9])
    whole = (tmp_path / DATA.format(9)).read_bytes()
    for at in range(0, len(whole), 371):
        (tmp_path / DATA.format(9)).write_bytes(whole)
        flip(tmp_path / DATA.format(9), at)
        assert_is(restored(tmp_path)[0], 6)
    (tmp_path / INDEX.format(6)).unlink()
    state = state_of(999)
    with pytest.raises(InputError, match=r"only damaged ones, of step 9"):
        Checkpoints(str(tmp_path), state, keep=3).restore()
    assert_is(state, 999)


def test_another_model_is_no_damage(tmp_path, capsys):
    saved(tmp_path, [6])
    before = contents(tmp_path)
    others = [
        state_of(0, shapes=[*SHAPES[:3], (64, 17)]),
        state_of(0, shapes=[*SHAPES, (2,)]),
        state_of(0, shapes=SHAPES[::-1]),
        state_of(0, shapes=list(SHAPES[:1]), dtype=tf.bfloat16),
    ]
    for state in others:
        with pytest.raises(InputError) as raised:
            Checkpoints(str(tmp_path), state, keep=3).restore()
        text = str(raised.value)
        assert text.startswith(f"--output_dir={tmp_path}: expected a checkpoint of this model")
        assert "ckpt-6, which is that of another (" in text and "\n" not in text
    assert contents(tmp_path) == before and not capsys.readouterr().out


def test_a_checkpoint_given_by_hand(tmp_path):
    saved(tmp_path / "a", [3, 6, 9])
    state = state_of(999)
    checkpoints = Checkpoints(str(tmp_path / "b"), state, keep=3)
    for suffix in ("", ".index"):
        set_step(state, 999)
        checkpoints.restore_from(f"{tmp_path}/a/ckpt-3{suffix}", "--eval_checkpoint")
        assert_is(state, 3)
    assert checkpoints.newest is None and not (tmp_path / "b").exists()
    with pytest.raises(InputError, match=r"^--eval_checkpoint=.*/ckpt-4: .*none there"):
        checkpoints.restore_from(f"{tmp_path}/a/ckpt-4", "--eval_checkpoint")
    flip(tmp_path / "a" / DATA.format(6), 0)
    with pytest.raises(InputError, match=r"^--eval_checkpoint=.*/ckpt-6: .*cannot be read \("):
        checkpoints.restore_from(f"{tmp_path}/a/ckpt-6", "--eval_checkpoint")
    foreign = tf.train.Checkpoint(other=tf.Variable([1.0])).write(f"{tmp_path}/foreign")
    with pytest.raises(InputError, match=r"^--eval_checkpoint=.*foreign: .*that of another \("):
        checkpoints.restore_from(foreign, "--eval_checkpoint")
    assert_is(state, 3)


class Killed(BaseException):
    """From here on nothing reaches the disk."""


def kill_at(monkeypatch, moment):
    """Lets the process do `moment` changes of the folder, and none after them."""
    changes = []

    def limited(plain):
        def change(*arguments, **options):
            if len(changes) >= moment:
                raise Killed
            changes.append(arguments)
            return plain(*arguments, **options)

        return change

    for place, name in (
        (tf.io.gfile, "rename"),
        (tf.io.gfile, "remove"),
        (tf.io.gfile, "rmtree"),
        (tf.train.Checkpoint, "write"),
        (files, "write"),
    ):
        monkeypatch.setattr(place, name, limited(getattr(place, name)))


def arrays_of(path):
    reader = tf.train.load_checkpoint(path)
    return [reader.get_tensor(f"v{i}/.ATTRIBUTES/VARIABLE_VALUE") for i in range(len(SHAPES))]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_save_killed_between_any_two_changes_leaves_a_good_newest(tmp_path, monkeypatch, damaged):
    reached = []
    for moment in range(30):
        folder = tmp_path / str(moment)
        checkpoints = saved(folder, [3, 6, 9] if damaged else [3, 6], keep=2)
        state = checkpoints._state
        if damaged:
            flip(folder / DATA.format(9), 0)
            checkpoints.restore()
        set_step(state, 9)
        ended = False
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, moment)
            checkpoints.save(9)
            ended = True
        # Before the next start as after it, TensorFlow finds one that is whole.
        latest = tf.train.latest_checkpoint(str(folder))
        for found, value in zip(arrays_of(latest), values_of(int(latest[-1])), strict=True):
            np.testing.assert_array_equal(found, value.astype(np.float32))
        state, path = restored(folder)
        reached.append(int(path[-1]))
        assert_is(state, reached[-1])
        assert path == tf.train.latest_checkpoint(str(folder)) and path >= latest
        saved(folder, [9, 12], keep=2)
        assert sorted(os.listdir(folder)) == both_of(9, 12)
        if ended:
            break
    assert ended and reached == sorted(reached) and set(reached) == {6, 9} and len(reached) > 6


def test_what_an_older_save_left_is_not_seen_and_goes_with_the_next(tmp_path):
    saved(tmp_path, [3, 6])
    part = tmp_path / "ckpt-9_temp" / "ckpt-9_temp" / "part-00000-of-00001.data-00000-of-00001"
    part.parent.mkdir(parents=True)
    for path in (
        part,
        tmp_path / "ckpt-8_temp",  # of TensorFlow's own manager
        tmp_path / DATA.format(9),
        tmp_path / (DATA.format(9) + ".tempstate123"),
        tmp_path / (INDEX.format(9) + ".tempstate456"),
        tmp_path / "checkpoint.tmp0a1b",
        tmp_path / "checkpoint.unfinished",
    ):
        if path.name.endswith("_temp"):
            path.mkdir()
        else:
            path.write_bytes(b"part")
    (tmp_path / "notes_temp").write_text("mine")
    state, path = restored(tmp_path)
    assert path == f"{tmp_path}/ckpt-6"
    assert_is(state, 6)
    saved(tmp_path, [12], keep=2)
    assert sorted(os.listdir(tmp_path)) == [*both_of(6, 12), "notes_temp"]


@pytest.mark.parametrize("limit", [300, 2000])
def test_a_full_disk_leaves_the_old_ones(tmp_path, limit):
    """A limit on the size of files plays the full disk: of the data, or of the index."""
    checkpoints = saved(tmp_path, [3, 6], keep=2)
    before = contents(tmp_path)
    set_step(checkpoints._state, 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as raised:
            checkpoints.save(9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(raised.value)
    assert text.startswith(f"--output_dir: {tmp_path} cannot be written (") and "\n" not in text
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == both_of(3, 6)
    assert checkpoints.newest == f"{tmp_path}/ckpt-6"
    checkpoints.save(9)
    assert sorted(os.listdir(tmp_path)) == both_of(6, 9)


@pytest.mark.parametrize("kind", ["data", "index"])
def test_a_write_that_fell_short_unnoticed_costs_no_good_one(tmp_path, monkeypatch, kind):
    checkpoints = saved(tmp_path, [3, 6], keep=1)
    before = contents(tmp_path)
    plain = tf.train.Checkpoint.write

    def short(state, prefix):
        path = plain(state, prefix)
        (name,) = pathlib.Path(path).parent.glob(f"*.{kind}*")
        os.truncate(name, name.stat().st_size // 2)
        return path

    monkeypatch.setattr(tf.train.Checkpoint, "write", short)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written"):
        checkpoints.save(9)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == both_of(6)


def test_mirrored_variables_are_saved_and_restored_on_every_replica(tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        state = tf.train.Checkpoint(v=tf.Variable(tf.range(6.0)))
    checkpoints = Checkpoints(str(tmp_path), state, keep=2)
    checkpoints.save(3)
    state.v.assign(tf.zeros(6))
    checkpoints.save(4)
    truncate(tmp_path / INDEX.format(4), 9)
    assert checkpoints.restore() == f"{tmp_path}/ckpt-3"
    for value in strategy.experimental_local_results(state.v):
        np.testing.assert_array_equal(value, range(6))


def test_on_gs_too(gcs, capsys):  # noqa: F811
    folder = f"{gcs.bucket}/run/checkpoints"
    assert restored(folder)[1] is None
    saved(folder, [3, 6, 9, 12], keep=2, every=6)
    names = [f"run/checkpoints/{name}" for name in both_of(6, 9, 12)]
    assert [name for name in gcs.names(f"{gcs.bucket}/run/") if name[-1] != "/"] == names
    with tf.io.gfile.GFile(f"{folder}/{DATA.format(12)}", "wb") as file:
        file.write(b"other")
    tf.io.gfile.remove(f"{folder}/{DATA.format(9)}")
    state, path = restored(folder)
    assert path == f"{folder}/ckpt-6" == tf.train.latest_checkpoint(folder)
    assert_is(state, 6)
    told = capsys.readouterr().out
    assert "ckpt-12 is damaged" in told and "ckpt-9 is damaged" in told

    checkpoints = Checkpoints(folder, state, keep=2)
    checkpoints.restore()
    set_step(state, 12)
    before = {name: gcs.content(f"{gcs.bucket}/{name}") for name in names if "-6." in name}
    gcs.deny("storage.objects.create")
    with pytest.raises(InputError, match=f"{folder} cannot be written: .*storage.objects.create"):
        checkpoints.save(12)
    gcs.deny("storage.objects.get")  # which says nothing about the checkpoints
    with pytest.raises(InputError, match=r"cannot be read: .*storage\.objects\.get"):
        restored(folder)
    gcs.deny()
    assert {name: gcs.content(f"{gcs.bucket}/{name}") for name in before} == before
    gcs.fail_every(5)
    saved(folder, [12], keep=2)
    state, path = restored(folder)
    assert path == f"{folder}/ckpt-12" == tf.train.latest_checkpoint(folder)
    assert_is(state, 12)
