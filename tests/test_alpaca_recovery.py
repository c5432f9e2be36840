"""Alpaca recovery: the published rule to the last bit, every mismatch a clear line, nothing half-written under its final name."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.alpaca.integrity import MANIFEST, SUMS_FILE, file_sha256, published_check, rotary_table_sum
from alignment.alpaca.llama_config import EMBEDDINGS, HEAD, LlamaConfig, read_llama_config
from alignment.alpaca.recover_alpaca_weights import Settings, recover
from alignment.alpaca.shards import WeightFolder, index_text
from alignment.alpaca.work_folder import PROGRESS
from alignment.config import load_config
from alignment.errors import UserError

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "alignment" / "alpaca" / "recover_alpaca_weights.py"
VOCABULARY = 50
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 2048,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}


def write_folder(
    folder: Path, tensors: dict, config: dict, kind: str = "safetensors", shards: int = 1, pad: str | None = None
):
    """A model folder with these tensors in `shards` files of one kind, and a tokenizer that names the pad token `pad`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = list(tensors)
    groups = [names[len(names) * k // shards : len(names) * (k + 1) // shards] for k in range(shards)]
    stem, ending, save = (
        ("model", "safetensors", save_file) if kind == "safetensors" else ("pytorch_model", "bin", torch.save)
    )
    files = [f"{stem}-{k:05d}-of-{shards:05d}.{ending}" for k in range(1, shards + 1)]
    files = files if shards > 1 else [f"{stem}.{ending}"]
    for file, group in zip(files, groups, strict=True):
        save({name: tensors[name] for name in group}, folder / file)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(index_text(dict(zip(files, groups, strict=True)), 0))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    return folder


def tiny_tensors(seed: int, rows: int, dtype: torch.dtype, config: dict = CONFIG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    }
    shapes = LlamaConfig(**sizes, vocab_size=rows).shapes()
    return {name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype) for name, shape in shapes.items()}


class TinyPair:
    """A base (float16, no pad row) and a difference (float32, one row more) that tests bend, and the rule written out."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base_tensors = tiny_tensors(1, VOCABULARY, torch.float16)
        self.diff_tensors = tiny_tensors(2, VOCABULARY + 1, torch.float32)
        self.base_config, self.diff_config = dict(CONFIG), {**CONFIG, "vocab_size": VOCABULARY + 1}
        self.base_pad: str | None = None
        self.kind, self.shards = "safetensors", 1

    def write(self) -> "TinyPair":
        layout = {"kind": self.kind, "shards": self.shards}
        write_folder(self.folder / "base", self.base_tensors, self.base_config, pad=self.base_pad, **layout)
        write_folder(self.folder / "diff", self.diff_tensors, self.diff_config, pad="[PAD]", **layout)
        return self

    def settings(self, **more) -> Settings:
        places = {"path_raw": "base", "path_diff": "diff", "path_tuned": "tuned"}
        given = {name: str(self.folder / place) for name, place in places.items()}
        return Settings(**{**given, "check_integrity_naively": False, **more})

    def flags(self, **more) -> list[str]:
        chosen = {"check_integrity_naively": "false", **more}
        places = {"path_raw": "base", "path_diff": "diff", "path_tuned": "tuned"}
        flags = [part for name, place in places.items() for part in (f"--{name}", str(self.folder / place))]
        return flags + [part for name, value in chosen.items() for part in (f"--{name}", str(value))]

    def expected(self) -> dict[str, torch.Tensor]:
        result = {}
        for name, diff in self.diff_tensors.items():
            base = self.base_tensors[name].float()
            if len(base) < len(diff):
                base = torch.cat([base, base.mean(dim=0, keepdim=True)])
            result[name] = diff.float() + base
        return result

    def tuned(self) -> dict[str, torch.Tensor]:
        return read_all(self.folder / "tuned")

    def nothing_named(self) -> bool:
        return not (self.folder / "tuned").exists()


@pytest.fixture
def pair(tmp_path) -> TinyPair:
    return TinyPair(tmp_path)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def run_script(flags: list[str], before: str = "", prefix: tuple = ()) -> subprocess.CompletedProcess:
    """The script in a process of its own, after the statements `before` ran there."""
    code = f"import sys; sys.argv = [{str(SCRIPT)!r}, *sys.argv[1:]]\n{before}\n"
    code += "from alignment.alpaca.recover_alpaca_weights import main\nfrom alignment.errors import run_main\nrun_main(main)"
    return subprocess.run([*prefix, sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=REPO)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(bytes(content))


# ---- the published rule


def test_the_golden_recovery_bit_for_bit(goldens, tmp_path):
    source = goldens / "alpaca"
    expected = json.loads((source / "expected.json").read_text())
    torch.set_num_threads(1)
    final = recover(
        Settings(
            path_raw=str(source / "base"),
            path_diff=str(source / "diff"),
            path_tuned=str(tmp_path / "tuned"),
            expected_sum=expected["tuned_sum_float32_sequential"],
        )
    )
    tuned = read_all(final)
    assert same(tuned, load_file(source / "tuned_expected" / "model.safetensors"))
    manifest = json.loads((final / MANIFEST).read_text())
    assert manifest["check"]["total"] == expected["tuned_sum_float32_sequential"]
    assert {name: entry["sum"] for name, entry in manifest["tensors"].items()} == expected["per_tensor_sum"]
    assert list(manifest["tensors"]) == expected["keys"]
    pad = expected["pad_row"]
    assert tuned[EMBEDDINGS][pad["id"], :4].tolist() == pad["tuned_embed_pad_row_first4"]
    assert tuned[HEAD][pad["id"], :4].tolist() == pad["tuned_lm_head_pad_row_first4"]
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (final / name).read_bytes() == (source / "diff" / name).read_bytes()
    config = json.loads((source / "tuned_expected" / "config.json").read_text())
    assert json.loads((final / "config.json").read_text()) == config


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2, 9])
def test_shards_and_formats_do_not_matter(pair, kind, shards):
    pair.kind, pair.shards = kind, shards
    recover(pair.write().settings(max_shard_gb=0.00001 if shards == 2 else 5.0))
    assert same(pair.tuned(), pair.expected())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_are_the_float32_sums_rounded_once(pair, dtype):
    from transformers import AutoModelForCausalLM

    recover(pair.write().settings(dtype=dtype))
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in pair.expected().items()}
    assert same(pair.tuned(), wanted)
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "tuned", dtype="auto")
    assert same(dict(model.state_dict()), wanted)


def test_several_output_shards_load_in_transformers(pair):
    from transformers import AutoModelForCausalLM

    recover(pair.write().settings(max_shard_gb=0.00001))
    assert len(list((pair.folder / "tuned").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "tuned", dtype=torch.float32)
    assert same(dict(model.state_dict()), pair.expected())


def test_a_difference_in_float16_is_added_in_float32(pair):
    pair.diff_tensors = {name: tensor.half() for name, tensor in pair.diff_tensors.items()}
    recover(pair.write().settings())
    assert same(pair.tuned(), pair.expected())


@pytest.mark.parametrize(
    "more", [{}, {"num_key_value_heads": 1}, {"head_dim": 12}, {"tie_word_embeddings": True}, {"rope_theta": 5e5}]
)
def test_names_and_shapes_are_those_of_transformers(tmp_path, more):
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **more}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = read_llama_config(tmp_path)
    assert list(ours.shapes().items()) == [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    model.config.save_pretrained(tmp_path)  # the same in the words of transformers 5
    assert read_llama_config(tmp_path) == ours


def test_a_config_of_the_wrong_kind_is_named(pair):
    pair.base_config["hidden_size"] = "16"
    with pytest.raises(UserError, match="base/config.json: hidden_size is '16'"):
        recover(pair.write().settings())


# ---- what can be wrong with the pair


def test_rotary_tables_are_left_out_and_noted(pair):
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    pair.base_tensors[table] = torch.ones(4)
    recover(pair.write().settings())
    assert table not in pair.tuned()
    del pair.base_tensors[table]
    assert same(pair.tuned(), pair.expected())
    notes = json.loads((pair.folder / "tuned" / MANIFEST).read_text())["notes"]
    assert len(notes) == 1 and table in notes[0] and "base" in notes[0]


@pytest.mark.parametrize("base_pad", [None, "[PAD]"])
def test_a_base_that_has_a_pad_row(pair, base_pad):
    pair.base_tensors = tiny_tensors(1, VOCABULARY + 1, torch.float16)
    pair.base_config["vocab_size"] = VOCABULARY + 1
    pair.base_pad = base_pad
    recover(pair.write().settings())
    if base_pad is None:  # as published: the token is new to the base's tokenizer, so its row is overwritten
        for name in (EMBEDDINGS, HEAD):
            pair.base_tensors[name] = pair.base_tensors[name][:VOCABULARY]
    assert same(pair.tuned(), pair.expected())
    notes = json.loads((pair.folder / "tuned" / MANIFEST).read_text())["notes"]
    assert len(notes) == 2 and all(str(VOCABULARY) in note and "pad row" in note for note in notes)


def test_a_tied_base_gives_its_embeddings_to_the_head(pair):
    pair.base_config["tie_word_embeddings"] = True
    del pair.base_tensors[HEAD]
    recover(pair.write().settings())
    pair.base_tensors[HEAD] = pair.base_tensors[EMBEDDINGS]
    assert same(pair.tuned(), pair.expected())


def test_tied_on_both_sides_writes_no_head(pair):
    from transformers import AutoModelForCausalLM

    for config, tensors in ((pair.base_config, pair.base_tensors), (pair.diff_config, pair.diff_tensors)):
        config["tie_word_embeddings"] = True
        del tensors[HEAD]
    recover(pair.write().settings())
    assert same(pair.tuned(), pair.expected())
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "tuned", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, pair.expected()[EMBEDDINGS])


def _llama_2(pair):
    pair.base_config |= {"rms_norm_eps": 1e-05, "max_position_embeddings": 4096}


def _other_vocabulary(pair):
    pair.base_tensors = tiny_tensors(1, VOCABULARY + 16, torch.float16)


def _other_width(pair):
    pair.base_config["intermediate_size"] = 32
    pair.base_tensors = tiny_tensors(1, VOCABULARY, torch.float16, pair.base_config)


def _lying_width(pair):
    pair.base_tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(30, 16)


def _base_without_head(pair):
    del pair.base_tensors[HEAD]


def _diff_without_head(pair):
    del pair.diff_tensors[HEAD]


def _only_diff_tied(pair):
    pair.diff_config["tie_word_embeddings"] = True


def _extra_in_base(pair):
    pair.base_tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)


def _layer_missing_on_both_sides(pair):
    for tensors in (pair.base_tensors, pair.diff_tensors):
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]


def _quantised(pair):
    pair.base_tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)


def _not_finite(pair):
    pair.base_tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("inf")


def _other_family(pair):
    pair.base_config["model_type"] = "gpt2"


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (_llama_2, ["LLaMA-2", "rms_norm_eps 1e-05", "max_position_embeddings 4096", "base/config.json"]),
        (_other_vocabulary, [EMBEDDINGS, "66 rows", "another vocabulary"]),
        (_other_width, ["wrong base", "intermediate_size 32"]),
        (_lying_width, ["layers.1.mlp.up_proj", "(30, 16)", "wrong base"]),
        (_base_without_head, [HEAD, "the base lacks"]),
        (_diff_without_head, [HEAD, "the difference lacks"]),
        (_only_diff_tied, [HEAD, "wrong base"]),
        (_extra_in_base, ["layers.0.self_attn.q_proj.bias", "the base has"]),
        (_layer_missing_on_both_sides, ["model.layers.1.self_attn.q_proj.weight", "a shard is missing"]),
        (_quantised, ["layers.0.mlp.up_proj.weight", "int8"]),
        (_not_finite, ["layers.0.mlp.up_proj.weight", "not finite", "base/model.safetensors"]),
        (_other_family, ["model_type", "gpt2"]),
    ],
)
def test_a_wrong_base_is_named_and_nothing_is_written(pair, bend, words):
    bend(pair)
    with pytest.raises(UserError) as error:
        recover(pair.write().settings())
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in sorted(pair.folder.iterdir())] == ["base", "diff"]


def test_the_tokenizers_are_looked_at(pair):
    (pair.write().folder / "base" / "tokenizer.model").write_bytes(b"other pieces")
    notes = json.loads((recover(pair.settings()) / MANIFEST).read_text())["notes"]
    assert len(notes) == 1 and "tokenizer.model of base and difference differ" in notes[0]
    (pair.folder / "diff" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="diff: no tokenizer"):
        recover(pair.settings(overwrite=True))


def test_float16_that_overflows_is_an_error(pair):
    pair.diff_tensors[HEAD][2, 2] = 1e5
    pair.write()
    with pytest.raises(UserError, match=r"lm_head\.weight has values beyond float16.*bfloat16"):
        recover(pair.settings(dtype="float16"))
    assert pair.nothing_named()
    recover(pair.settings(dtype="bfloat16"))


@pytest.mark.parametrize("side", ["base", "diff"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_named(pair, side, kind):
    pair.kind, pair.shards = kind, 3
    lost = sorted((pair.write().folder / side).glob(f"*00002-of-00003.{kind}"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}.*download it again"):
        recover(pair.settings())
    assert [path.name for path in sorted(pair.folder.iterdir())] == ["base", "diff"]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-not-exist",)


def test_a_pickle_that_runs_code_is_refused(pair):
    pair.kind = "bin"
    file = pair.write().folder / "diff" / "pytorch_model.bin"
    torch.save({"x": _Evil()}, file, pickle_module=pickle)
    with pytest.raises(UserError, match=f"{file}.*could run code"):
        recover(pair.settings())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_cut_short_is_named(pair, kind):
    pair.kind = kind
    file = next((pair.write().folder / "diff").glob(f"*model.{kind}"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{file}.*damaged"):
        recover(pair.settings())


# ---- integrity


def test_the_rotary_table_of_7b():
    assert rotary_table_sum(LlamaConfig()) == pytest.approx(7.459954261779785, abs=1e-6)


def test_the_published_sum_is_explained(goldens):
    config = read_llama_config(goldens / "alpaca" / "diff")
    sums = json.loads((goldens / "alpaca" / "expected.json").read_text())["per_tensor_sum"]
    today = published_check(list(sums), sums, config)
    assert not today.passed and "expected 50637.1836" in today.verdict
    assert today.with_tables == pytest.approx(today.total + 2 * rotary_table_sum(config), abs=1e-4)
    for expected, words in (
        (today.total, "agrees, as published"),
        (today.with_tables, "when the rotary tables are counted"),
        (today.exact - 0.05, "within the rounding of a float32 sum"),
        (today.exact_with_tables + 0.05, "rounding of a float32 sum when the rotary tables"),
    ):
        check = published_check(list(sums), sums, config, expected)
        assert check.passed and words in check.verdict
    assert not published_check(list(sums), sums, config, today.total + 0.5).passed


def test_without_agreement_nothing_gets_the_name(pair):
    pair.write()
    with pytest.raises(UserError, match="integrity check failed.*--check_integrity_naively false"):
        recover(pair.settings(check_integrity_naively=True))
    work = pair.folder / "tuned.partial"
    assert pair.nothing_named() and not (work / "config.json").exists()
    written = (work / "model.safetensors").stat().st_mtime_ns
    recover(pair.settings())  # switched off: what is there is used
    assert (pair.folder / "tuned" / "model.safetensors").stat().st_mtime_ns == written
    assert not work.exists() and same(pair.tuned(), pair.expected())
    with pytest.raises(UserError, match="integrity check failed"):
        recover(pair.settings(check_integrity_naively=True))


@pytest.mark.parametrize("side", ["base", "diff"])
def test_a_flipped_byte_in_a_bin_shard_is_named(pair, side):
    pair.kind, pair.shards = "bin", 2
    file = pair.write().folder / side / "pytorch_model-00002-of-00002.bin"
    tensor = WeightFolder(pair.folder / side).tensor("model.norm.weight")
    flip(file, file.read_bytes().index(tensor.numpy().tobytes()) + 5)
    with pytest.raises(UserError, match=f"{file}.*corrupt.*CRC-32"):
        recover(pair.settings())
    assert pair.nothing_named()


def test_a_flipped_byte_in_a_safetensors_shard_is_named_by_its_checksum(pair):
    pair.shards = 3
    pair.write()
    for side in ("base", "diff"):
        files = sorted((pair.folder / side).glob("*.safetensors"))
        (pair.folder / side / SUMS_FILE).write_text("".join(f"{file_sha256(file)}  {file.name}\n" for file in files))
    recover(pair.settings())
    shutil.rmtree(pair.folder / "tuned")
    flip(pair.folder / "base" / "model-00002-of-00003.safetensors", -100)
    with pytest.raises(UserError, match="base/model-00002-of-00003.safetensors.*corrupt.*SHA-256"):
        recover(pair.settings())
    assert pair.nothing_named()


def test_a_flipped_byte_without_any_checksum_is_found_by_a_known_good_manifest(pair):
    pair.shards = 3
    pair.write()
    good = json.loads((recover(pair.settings()) / MANIFEST).read_text())
    reference = pair.folder / "good.json"
    reference.write_text(json.dumps(good))
    shutil.rmtree(pair.folder / "tuned")
    recover(pair.settings(reference_manifest=str(reference)))
    shutil.rmtree(pair.folder / "tuned")
    file = pair.folder / "diff" / "model-00001-of-00003.safetensors"
    flip(file, -3)  # in the mantissa of one weight: no sum would show it
    with pytest.raises(UserError, match=f"good.json.*differs, made from .*base.*{file.name} .difference"):
        recover(pair.settings(reference_manifest=str(reference)))
    assert pair.nothing_named()
    with pytest.raises(UserError, match="float32, this one is in bfloat16"):
        recover(pair.settings(reference_manifest=str(reference), dtype="bfloat16"))


# ---- kill, full disk, no permission, again


@pytest.mark.slow
def test_kill_9_in_the_middle_and_again(pair):
    pair.shards = 2
    pair.write()
    # The tenth tensor never gets done: the process dies with a shard half-written.
    kill = (
        "import os, signal\nimport alignment.alpaca.recover_alpaca_weights as script\n"
        "add, calls = script.add_blocks, []\n"
        "def dying(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return add(*args)\n"
        "script.add_blocks = dying"
    )
    flags = pair.flags(max_shard_gb="0.00001")
    died = run_script(flags, before=kill)
    work = pair.folder / "tuned.partial"
    assert died.returncode == -9 and pair.nothing_named()
    assert not (work / "config.json").exists()
    rows = [json.loads(line) for line in (work / PROGRESS).read_text().splitlines()]
    finished = {row["shard"]: (work / row["shard"]).stat().st_mtime_ns for row in rows[1:]}
    assert finished and len(finished) < len(rows[0]["plan"]["shards"])
    assert [path for path in work.iterdir() if path.suffix == ".tmp"]

    again = run_script(flags)
    assert again.returncode == 0, again.stderr
    assert f"{len(finished)} of {len(rows[0]['plan']['shards'])} shards are finished" in again.stdout
    assert all((pair.folder / "tuned" / file).stat().st_mtime_ns == time for file, time in finished.items())
    assert same(pair.tuned(), pair.expected())
    assert not work.exists()
    assert not [
        path.name for path in (pair.folder / "tuned").iterdir() if path.name.startswith(".") or PROGRESS in path.name
    ]


def test_a_finished_shard_that_was_damaged_is_written_again(pair, capsys):
    pair.write()
    with pytest.raises(UserError, match="integrity"):
        recover(pair.settings(check_integrity_naively=True, max_shard_gb=0.00001))
    flip(pair.folder / "tuned.partial" / "model-00001-of-00003.safetensors", -2)
    recover(pair.settings(max_shard_gb=0.00001))
    assert "is corrupt: writing this shard again" in capsys.readouterr().out
    assert same(pair.tuned(), pair.expected())


def test_other_inputs_begin_again(pair, capsys):
    pair.write()
    with pytest.raises(UserError, match="integrity"):
        recover(pair.settings(check_integrity_naively=True))
    pair.base_tensors = tiny_tensors(7, VOCABULARY, torch.float16)
    pair.write()
    recover(pair.settings())
    assert "beginning again" in capsys.readouterr().out
    assert same(pair.tuned(), pair.expected())


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_rerun_goes_on(pair):
    pair.write()
    largest = max(tensor.numel() for tensor in pair.diff_tensors.values()) * 4
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest * 2},) * 2)"
    full = run_script(pair.flags(), before=limit)
    assert full.returncode == 2 and pair.nothing_named()
    assert (
        full.stderr.count("\n") == 1
        and "tuned.partial/model.safetensors" in full.stderr
        and "error: cannot write" in full.stderr
    )
    assert not (pair.folder / "tuned.partial").exists()  # nothing was finished, so nothing stays
    assert run_script(pair.flags()).returncode == 0
    assert same(pair.tuned(), pair.expected())


def test_room_is_looked_at_first(pair, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="0.0 GB free, 0.1 GB needed"):
        recover(pair.write().settings())
    assert [path.name for path in sorted(pair.folder.iterdir())] == ["base", "diff"]


def test_a_file_where_the_target_should_be(pair):
    pair.write()
    (pair.folder / "file").write_text("")
    for target in (pair.folder / "file", pair.folder / "file" / "tuned"):
        with pytest.raises(UserError, match=str(pair.folder / "file")):
            recover(pair.settings(path_tuned=str(target)))


@pytest.mark.slow
def test_a_read_only_target_is_one_line(pair):
    prefix: tuple = ()
    if os.geteuid() == 0:  # root writes everywhere, unless it lacks this capability
        prefix = ("setpriv", "--bounding-set=-dac_override")
        if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
            pytest.skip("root may write everywhere, and setpriv cannot take that away here")
    place = pair.write().folder / "place"
    place.mkdir(mode=0o500)
    done = run_script(pair.flags()[:4] + ["--path_tuned", str(place / "tuned")], prefix=prefix)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.strip()
        == f"error: cannot write {place}/tuned.partial: Permission denied; choose another --path_tuned"
    )
    assert not list(place.iterdir())


def test_two_at_once(pair):
    import fcntl

    pair.write()
    (pair.folder / "tuned.partial").mkdir()
    with open(pair.folder / "tuned.partial" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another recovery is writing there"):
            recover(pair.settings())
    recover(pair.settings())


def test_a_second_run_changes_nothing_and_never_replaces_something_else(pair, capsys):
    pair.write()
    final = recover(pair.settings())
    before = {path.name: path.stat().st_mtime_ns for path in final.iterdir()}
    recover(pair.settings())
    assert "already recovered" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in final.iterdir()} == before
    with pytest.raises(UserError, match="--overwrite"):
        recover(pair.settings(dtype="bfloat16"))
    recover(pair.settings(dtype="bfloat16", overwrite=True))
    assert pair.tuned()[EMBEDDINGS].dtype == torch.bfloat16
    assert sorted(path.name for path in pair.folder.iterdir()) == ["base", "diff", "tuned"]


def test_settings_are_strict(pair):
    with pytest.raises(UserError, match="--path_raw is needed"):
        load_config(Settings, [], prog="x", description="")
    with pytest.raises(UserError, match="three different folders"):
        pair.settings(path_tuned=str(pair.folder / "base"))
    with pytest.raises(UserError, match="bfloat16"):
        load_config(Settings, pair.flags(dtype="bfloat15"), prog="x", description="")


# ---- memory


def _bench():
    spec = importlib.util.spec_from_file_location("alpaca_bench", REPO / "bench" / "alpaca_recovery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["alpaca_bench"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "kind"), [(1, "safetensors"), (1, "bin"), (3, "safetensors")])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, shards, kind):
    bench = _bench()
    (tmp_path / "small").mkdir()
    _, ground = bench.recover(
        *bench.make_pair(tmp_path / "small", bench.widths(1, 64, 64, 100), 1, kind), tmp_path / "s"
    )
    config = bench.widths(layers=6, hidden=1024, mlp=2752)
    base, diff = bench.make_pair(tmp_path, config, shards, kind)
    _, peak = bench.recover(base, diff, tmp_path / "tuned")
    largest = (config["vocab_size"] + 1) * config["hidden_size"] * 4
    total = sum(file.stat().st_size for file in (tmp_path / "tuned").glob("*.safetensors"))
    assert total > 4 * largest
    assert peak - ground < 1.5 * largest, f"{peak / 2**20:.0f} MiB, {ground / 2**20:.0f} without tensors"
