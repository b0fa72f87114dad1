"""Keypoint tokens: only their rows are trained, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spctrl.errors import ExpectedError
from spctrl.models.tokens import INITIALIZERS, PLACEHOLDERS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spctrl.models.tiny import write_tokenizer  # noqa: E402
from spctrl.models.tokens import (  # noqa: E402
    add_keypoint_tokens,
    learned_embeds,
    load_learned_embeds,
    save_learned_embeds,
    set_learned_embeds,
    trainable_token_rows,
)

OLD_ROWS = 49_408
WIDTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return made


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(folder)


def small_config() -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=OLD_ROWS,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=1,
        bos_token_id=OLD_ROWS - 2,
        eos_token_id=OLD_ROWS - 1,
    )


@pytest.fixture
def text_encoder() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPTextModel(small_config())


def token_of(tokenizer: Any, word: str) -> int:
    (found,) = tokenizer.encode(word, add_special_tokens=False)
    return int(found)


def table(text_encoder: Any) -> Any:
    return text_encoder.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("dataset", PLACEHOLDERS)
def test_each_placeholder_starts_from_its_word(dataset: str, tokenizer: Any, text_encoder: Any) -> None:
    before = table(text_encoder).clone()
    ids = add_keypoint_tokens(tokenizer, text_encoder, dataset)
    assert ids == list(range(OLD_ROWS, OLD_ROWS + 17))
    after = table(text_encoder)
    assert len(after) == OLD_ROWS + 17
    assert torch.equal(after[:OLD_ROWS], before)
    for token_id, word in zip(ids, INITIALIZERS[dataset], strict=True):
        assert torch.equal(after[token_id], before[token_of(tokenizer, word)])


def test_names_are_the_released_ones() -> None:
    assert PLACEHOLDERS["ap10k"][:5] == ("<left-eye>", "<right-eye>", "<nose>", "<neck>", "<root-of-tail>")
    assert PLACEHOLDERS["humanart"][-1] == "<right-ankle>"
    assert set(INITIALIZERS["ap10k"]) == {
        "eye",
        "nose",
        "neck",
        "tail",
        "shoulder",
        "elbow",
        "paw",
        "hip",
        "knee",
    }
    humanart = {"nose", "eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"}
    assert set(INITIALIZERS["humanart"]) == humanart


def test_a_prompt_has_one_token_for_each_placeholder(tokenizer: Any, text_encoder: Any) -> None:
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    found = tokenizer.encode("a dog <<left-eye>, <root-of-tail>>.", add_special_tokens=False)
    assert [each for each in found if each in ids] == [ids[0], ids[4]]


def test_adding_them_again_changes_nothing(tokenizer: Any, text_encoder: Any) -> None:
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    set_learned_embeds(tokenizer, text_encoder, {"<nose>": torch.ones(WIDTH)})
    before = table(text_encoder).clone()
    assert add_keypoint_tokens(tokenizer, text_encoder, "ap10k") == ids
    assert torch.equal(table(text_encoder), before)


def test_a_tokenizer_that_knows_them_and_an_encoder_that_does_not(tokenizer: Any, text_encoder: Any) -> None:
    tokenizer.add_tokens(list(PLACEHOLDERS["ap10k"]))
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    eye = table(text_encoder)[token_of(tokenizer, "eye")]
    assert torch.equal(table(text_encoder)[ids[0]], eye)


def test_a_word_of_several_tokens_is_refused(
    tokenizer: Any, text_encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INITIALIZERS, "ap10k", ("quillback",) * 17)
    with pytest.raises(ExpectedError, match=r"expected 'quillback' to be one token .*, found \d"):
        add_keypoint_tokens(tokenizer, text_encoder, "ap10k")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_their_rows_change_in_training(dtype: Any, tokenizer: Any, text_encoder: Any) -> None:
    """With weight decay, which moves rows of zero gradient too, and with text that has old tokens in it."""
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    text_encoder.get_input_embeddings().to(dtype)
    before = {name: each.clone() for name, each in text_encoder.state_dict().items()}
    rows = trainable_token_rows(text_encoder, ids)
    start = rows.detach().clone()
    assert [each for each in text_encoder.parameters() if each.requires_grad] == [rows]
    optimizer = torch.optim.AdamW([rows], lr=0.1, weight_decay=0.1)
    used = torch.tensor([[5, ids[0], 7, ids[3], 5], [ids[16], 9, 9, 11, OLD_ROWS - 1]])
    for _ in range(3):
        optimizer.zero_grad()
        text_encoder.get_input_embeddings()(used).float().square().sum().backward()
        optimizer.step()
    after = text_encoder.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert not any(torch.equal(*each) for each in zip(rows, start, strict=True))
    found = text_encoder.get_input_embeddings()(torch.arange(OLD_ROWS + 17))
    assert found.dtype == dtype
    assert torch.equal(found[:OLD_ROWS], table(text_encoder)[:OLD_ROWS])
    assert torch.equal(found[OLD_ROWS:], rows.to(dtype))


def test_gradient_of_the_rows_is_that_of_a_whole_table(tokenizer: Any, text_encoder: Any) -> None:
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    used = torch.tensor([[OLD_ROWS - 2, ids[0], 7, ids[3], ids[0], OLD_ROWS - 1]])
    plain = text_encoder(used).last_hidden_state
    plain.square().sum().backward()
    expected = text_encoder.get_input_embeddings().weight.grad[ids]
    rows = trainable_token_rows(text_encoder, ids)
    wrapped = text_encoder(used).last_hidden_state
    assert torch.equal(wrapped, plain)
    wrapped.square().sum().backward()
    torch.testing.assert_close(rows.grad, expected)


def test_learned_embeddings_go_through_a_file_into_another_encoder(
    tokenizer: Any, text_encoder: Any, folder: Path, tmp_path: Path
) -> None:
    ids = add_keypoint_tokens(tokenizer, text_encoder, "ap10k")
    fresh = transformers.CLIPTokenizer.from_pretrained(folder)
    rows = trainable_token_rows(text_encoder, ids)
    with torch.no_grad():
        rows.normal_()
    save_learned_embeds(tmp_path / "learned_embeds.bin", learned_embeds(tokenizer, text_encoder, "ap10k"))
    found = load_learned_embeds(tmp_path / "learned_embeds.bin")
    assert list(found) == list(PLACEHOLDERS["ap10k"])
    other = transformers.CLIPTextModel(small_config())
    before = table(other).clone()
    assert set_learned_embeds(fresh, other, found) == ids
    assert torch.equal(table(other)[ids], rows)
    assert torch.equal(table(other)[:OLD_ROWS], before)
    assert learned_embeds(fresh, other, "ap10k").keys() == found.keys()


def test_embeddings_of_another_width_are_refused(tokenizer: Any, text_encoder: Any) -> None:
    with pytest.raises(ExpectedError, match=r"width 8, found shape \(768,\) for <nose>"):
        set_learned_embeds(tokenizer, text_encoder, {"<nose>": torch.zeros(768)})


class Evil:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not torch's",
        [1],
        {},
        {"<nose>": 1},
        {1: torch.zeros(3)},
        {"<nose>": torch.zeros(2, 3)},
        Evil(),
    ],
    ids=["absent", "empty", "text", "list", "nothing", "number", "key", "matrix", "code"],
)
def test_other_files_are_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "learned_embeds.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ExpectedError, match="expected a dict of placeholders"):
        load_learned_embeds(path)
    assert not Path("executed").exists()
