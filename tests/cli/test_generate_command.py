"""`gemma4-kernels generate`: the text of a folder's model, with drafts and without."""

from __future__ import annotations

import io
import sys

import pytest

pytest.importorskip("transformers")

import small_models
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemma4_kernels import mtp
from gemma4_kernels.cli.generate import _Printer

VOCAB = small_models.VOCAB


@pytest.fixture(scope="module")
def pair():
    return small_models.mtp_pair()


@pytest.fixture(scope="module")
def folders(pair, tmp_path_factory):
    """Folders of the model with its tokenizer, whose words are numbers, and of the assistant."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("target", "assistant"), pair, strict=True):
        model.save_pretrained(folder / name)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3").save_pretrained(folder / "target")
    return folder


def words(tokens):
    return " ".join(f"w{token}" for token in tokens)


def text_of(pair, prompt, **options):
    return words(mtp.generate(pair[0], None, [prompt], **options).tokens[0])


@pytest.mark.parametrize("drafts", ["", "--drafter {assistant}", "--drafter {assistant} -k 3 --fixed"])
def test_the_text_is_printed_and_the_figures_go_to_stderr(command, folders, pair, drafts):
    answer = command(
        f"gemma4-kernels generate {folders}/target 'w5 w9 w77' -n 12 --dtype float32 --device cpu "
        + drafts.format(assistant=folders / "assistant")
    )
    assert answer.status == 0, answer.err
    assert answer.out.strip() == text_of(pair, [5, 9, 77], max_new_tokens=12)
    assert "12 tokens in" in answer.err
    assert ("no drafts" in answer.err) == (not drafts)


def test_several_prompts_are_one_batch(command, folders, pair):
    answer = command(
        f"gemma4-kernels generate {folders}/target 'w5 w9 w77' 'w8' -n 6 -t 1 --seed 4 --dtype float32 --device cpu "
        f"--drafter {folders}/assistant"
    )
    assert answer.status == 0, answer.err
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    for number, prompt in enumerate(([5, 9, 77], [8])):
        assert f"[{number}] {text_of(pair, prompt, seeds=4 + number, **options)}\n" in answer.out


def test_a_prompt_may_come_from_stdin_and_a_string_may_end_the_text(command, folders, pair, monkeypatch):
    whole = text_of(pair, [5, 9, 77], max_new_tokens=12).split()
    stop = whole[4]
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w9 w77"))
    answer = command(f"gemma4-kernels generate {folders}/target -n 12 --stop {stop} --dtype float32 --device cpu")
    assert answer.status == 0, answer.err
    assert answer.out.split() == whole[: whole.index(stop) + 1]


def test_characters_of_several_tokens_are_printed_once(capsys):
    """A tokenizer that takes back what it made of bytes until a character is whole."""

    class Bytes:
        @staticmethod
        def decode(tokens, skip_special_tokens):
            try:
                return bytes(tokens).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(tokens)

    for text in ("a\u00e9\u00fcb", "\U00010348\U00010349\U0001034a", "one two"):
        printer = _Printer(Bytes, 1)
        tokens = list(text.encode())
        for place, token in enumerate(tokens):
            printer(mtp.Update(0, [token], "length" if place == len(tokens) - 1 else None, mtp.Statistics()))
        assert capsys.readouterr().out == text


def test_the_figures_stand_below_the_text_on_a_terminal(capsys):
    class Words:
        @staticmethod
        def decode(tokens, skip_special_tokens):
            return "".join(f"w{token} " for token in tokens)

    printer = _Printer(Words, 1)
    printer.live = True
    statistics = mtp.Statistics()
    statistics.saw_first(1)
    printer(mtp.Update(0, [1], None, statistics))
    assert "nan" not in capsys.readouterr().err
    statistics.saw(offered=4, accepted=3, emitted=4)
    printer(mtp.Update(0, [2, 3], None, statistics))
    answer = capsys.readouterr()
    assert answer.out == "w2 w3 "
    assert "5 tokens, 4.00 a pass, 75% of the drafts accepted" in answer.err


def test_what_is_wrong_is_said_in_one_line(command, folders, tmp_path):
    for line, said in (
        (f"{tmp_path}/nothing w5", "nothing"),
        (f"{folders}/target w5 --drafter {tmp_path}", "config.json"),
        (f"{folders}/target w5 --weights {tmp_path}/none.gguf", "is neither a file nor a folder"),
        (f"{folders}/target w5 --device tpu", "device must be cpu, cuda, cuda:N or mps, got 'tpu'"),
        (f"{folders}/target w5 -n 0", "max_new_tokens must be at least 1"),
        (f"{folders}/target w5 --top-p 3 -t 1", "top_p must be from 0 to 1"),
    ):
        device = "" if "--device" in line else "--device cpu"
        answer = command(f"gemma4-kernels generate {line} --dtype float32 {device}")
        assert answer.status == 2
        assert said in answer.err
        assert "Traceback" not in answer.err
