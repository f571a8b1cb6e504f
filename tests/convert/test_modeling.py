"""The exported code against the model it came from: logits, loss, gradients, streams, batches, and what users do."""

import copy
import json
import os
from unittest import mock

import pytest
import torch

from infini_train.checkpoint.store import open_checkpoint, resolve
from infini_train.config.attention import MixedConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, validate
from infini_train.config.model import RopeScaling
from infini_train.convert.exporting import export_checkpoint
from infini_train.convert.importing import import_folder

transformers = pytest.importorskip("transformers")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # for values around 1 to 10
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
VARIANTS = (
    "linear", "delta", "delta-sharp", "linear-overlap", "linear-conv", "gated", "gated-token", "local", "mixed", "full"
)  # fmt: skip
SHAPES = {
    "llama3": {"rope_scaling": RopeScaling(factor=4.0, original_tokens=40), "tied_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "values": {"value_head_dim": 6},
}


@pytest.fixture(autouse=True)
def environment():
    """As it was: accelerate says in it which rank this process is."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def pair(tiny, write_checkpoint, tmp_path, process_groups, monkeypatch):
    """Our model, and the same as transformers loads it."""

    def make(variant, dtype=torch.float32, **changes):
        from transformers import dynamic_module_utils

        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        ours = write_checkpoint(tmp_path / "run", tiny(variant, **changes))
        found = export_checkpoint(open_checkpoint(resolve(tmp_path / "run")), tmp_path / "hf", dtype=dtype)
        assert (tmp_path / "hf" / "modeling_infini.py").exists() == (variant != "full")
        assert len(found.notes) == 1  # that there is no tokenizer
        load = transformers.AutoModelForCausalLM.from_pretrained
        return ours.to(dtype), load(tmp_path / "hf", trust_remote_code=True, **{DTYPE: dtype}).eval()

    return make


def tokens_of(rows, columns):
    return torch.randint(0, 40, (rows, columns), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens_BT):
    """Of our model, from an empty memory."""
    grid = model.make_grids(torch.zeros(tokens_BT.shape, dtype=torch.bool), torch.ones(tokens_BT.shape), None)
    return model.logits(model.decode(tokens_BT, grid, None)[0]).transpose(0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_ours(variant, pair):
    ours, theirs = pair(variant)
    tokens_BT = tokens_of(2, 45)  # several segments and an open one
    expected, found = logits_of(ours, tokens_BT), theirs(tokens_BT).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for logits in (expected, found):
        (logits * weights).mean().backward()
    mine = dict(ours.named_parameters())
    if variant != "full":
        from infini_train.convert.family import list_weights
        from infini_train.convert.with_memory import list_memory_weights

        table = {**list_weights(ours.config), **list_memory_weights(ours.config)}
        assert {weight.theirs for weight in table.values()} == {name for name, _ in theirs.named_parameters()}
        assert mine.keys() == table.keys()
        theirs_named = dict(theirs.named_parameters())
        for name, weight in table.items():
            gradient = theirs_named[weight.theirs].grad
            scale = mine[name].grad.abs().max()
            torch.testing.assert_close(gradient / scale, mine[name].grad / scale, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_model(shape, pair):
    ours, theirs = pair("gated-token", **SHAPES[shape])
    tokens_BT = tokens_of(2, 45)
    first = theirs(tokens_BT[:, :19], use_cache=True)
    rest = theirs(tokens_BT[:, 19:], past_key_values=first.to_tuple()[-1])
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), logits_of(ours, tokens_BT), **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_any_cut_of_a_text_gives_the_same(variant, pair):
    _, theirs = pair(variant)
    tokens_BT = tokens_of(2, 45)
    with torch.no_grad():
        whole = theirs(tokens_BT).logits
        theirs.config.window_tokens = 13
        torch.testing.assert_close(theirs(tokens_BT).logits, whole, **CLOSE)
        torch.testing.assert_close(theirs(tokens_BT, logits_to_keep=5).logits, whole[:, -5:], **CLOSE)
        state, found = None, []
        for part in tokens_BT.split([1, 9, 2, 20, 1, 1, 11], 1):
            out = theirs(part, past_key_values=state, use_cache=True)
            state = out.to_tuple()[-1]
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)
    assert state.get_seq_length() == 45


@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_padding_on_either_side_changes_nothing(variant, pair):
    """Rows of different lengths, cut anywhere: each is what it is alone."""
    _, theirs = pair(variant)
    theirs.config.window_tokens = 16
    tokens_BT, lengths = tokens_of(3, 45), (45, 30, 7)
    with torch.no_grad():
        alone = [theirs(row[None, :length]).logits[0] for row, length in zip(tokens_BT, lengths, strict=True)]
        more = [
            theirs(torch.cat((row[:n], row[:9]))[None]).logits[0, n:] for row, n in zip(tokens_BT, lengths, strict=True)
        ]
        for side in ("right", "left"):
            columns = [slice(0, n) if side == "right" else slice(45 - n, 45) for n in lengths]
            mask, padded = torch.zeros(3, 45, dtype=torch.long), torch.full((3, 45), 3)
            for b, (part, n) in enumerate(zip(columns, lengths, strict=True)):
                mask[b, part], padded[b, part] = 1, tokens_BT[b, :n]
            out = theirs(padded, attention_mask=mask, use_cache=True)
            for b, part in enumerate(columns):
                torch.testing.assert_close(out.logits[b, part], alone[b], **CLOSE)
            again = theirs(
                tokens_BT[:, :9],
                attention_mask=torch.cat((mask, mask.new_ones(3, 9)), 1),
                past_key_values=out.to_tuple()[-1],
            )
            for b in range(3):
                torch.testing.assert_close(again.logits[b], more[b], **CLOSE)


class Listener(transformers.generation.BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("variant", ["linear", "gated-token", "mixed"])
def test_generation_is_that_of_the_whole_text(variant, pair):
    """Greedy, sampled and by beams, a batch of different lengths, and on from a state that was kept."""
    _, theirs = pair(variant)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [tokens_of(1, n) for n in (23, 9)]
    alone = [theirs.generate(prompt, **settings)[0, prompt.shape[1] :] for prompt in prompts]
    slow = [theirs.generate(prompt, use_cache=False, **settings)[0, prompt.shape[1] :] for prompt in prompts]
    padded = torch.cat((prompts[0], torch.cat((torch.zeros(1, 14, dtype=torch.long), prompts[1]), 1)))
    mask = torch.ones_like(padded)
    mask[1, :14] = 0
    together = theirs.generate(padded, attention_mask=mask, **settings)[:, 23:]
    for b in range(2):
        assert torch.equal(alone[b], slow[b]) and torch.equal(together[b], alone[b])
    beams = theirs.generate(prompts[0], num_beams=3, **settings)
    assert torch.equal(beams, theirs.generate(prompts[0], num_beams=3, use_cache=False, **settings))
    heard = Listener()
    theirs.generate(prompts[0], streamer=heard, **settings)
    assert heard.ids == [*prompts[0][0].tolist(), *alone[0].tolist()]
    torch.manual_seed(0)
    assert theirs.generate(prompts[0], **{**settings, "do_sample": True}, num_return_sequences=2).shape == (2, 35)

    state = theirs(prompts[0], use_cache=True).to_tuple()[-1]
    for _ in range(2):  # one text, read once, asked twice
        longer = torch.cat((prompts[0], prompts[1]), 1)
        asked = theirs.generate(longer, past_key_values=copy.deepcopy(state), **settings)
        assert torch.equal(asked, theirs.generate(longer, **settings))
        whole = torch.ones_like(longer)  # the new ids alone
        more = theirs.generate(prompts[1], past_key_values=copy.deepcopy(state), attention_mask=whole, **settings)
        assert torch.equal(more[:, 9:], asked[:, 32:])
    with pytest.raises(ValueError, match="the state has read 23 columns: give the ids of the whole text"):
        theirs.generate(prompts[1], past_key_values=state, **settings)


def test_a_stream_has_a_state_of_fixed_size(pair):
    _, theirs = pair("gated-token")
    sizes = []
    with torch.no_grad():
        state = None
        for part in tokens_of(1, 4096).split(1024, 1):
            out = theirs(part, past_key_values=state, use_cache=True, logits_to_keep=1)
            state = out.to_tuple()[-1]
            assert out.logits.shape == (1, 1, 40)
            sizes.append(state.nbytes)
    assert len(set(sizes)) == 1


def test_saved_trained_and_loaded_again(pair, tmp_path):
    """save_pretrained keeps the code; the loss is transformers'; recomputed layers have the same gradients."""
    ours, theirs = pair("gated-token", tied_embeddings=True, vocab_size=260)
    theirs.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    import_folder(tmp_path / "saved", tmp_path / "back", tokenizer="byte")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "infini"
    tokens_BT = tokens_of(2, 45)
    found = again(tokens_BT, labels=tokens_BT)
    logits = logits_of(ours, tokens_BT)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected, **CLOSE)
    found.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in again.named_parameters()}
    again.zero_grad()
    again.train()
    again.gradient_checkpointing_enable()
    again(tokens_BT, labels=tokens_BT).loss.backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["linear", "delta", "gated-token", "mixed"])
def test_in_bf16(variant, pair):
    """As near to our fp32 as our own bf16 is, within a factor of two."""
    ours, theirs = pair(variant, torch.bfloat16)
    tokens_BT = tokens_of(2, 45)
    with torch.no_grad():
        mine, found = logits_of(ours, tokens_BT), theirs(tokens_BT).logits.float()
        exact = logits_of(ours.float(), tokens_BT)
    assert (found - exact).square().mean() < 4 * (mine - exact).square().mean()


def test_trainer_and_adapters(pair, tmp_path):
    """Two steps of transformers' Trainer on a LoRA of peft, layers computed again; merged, saved, loaded."""
    peft = pytest.importorskip("peft")
    _, theirs = pair("gated-token")
    tokens_BT = tokens_of(4, 45)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens_BT]
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    settings = transformers.TrainingArguments(
        output_dir=tmp_path / "trainer", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, gradient_checkpointing=True, eval_strategy="steps", eval_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=adapted, args=settings, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    adapted.merge_and_unload().eval().save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens_BT).logits, adapted.base_model.model(tokens_BT).logits)


def test_the_evaluation_harness_reads_it(pair, save_text_files, tmp_path):
    """Batched, padded by the harness itself; against the loss of each text alone."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    _, theirs = pair("gated-token", vocab_size=263)
    save_text_files(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    model = huggingface.HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=64)
    pairs = [("a text of some length", " that goes on"), ("one", " two"), ("", "nothing before")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(*texts,), idx=i) for i, texts in enumerate(pairs)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (total, _) in zip(pairs, found, strict=True):
        context_ids = tokenizer.encode(context) or [tokenizer.bos_token_id]
        ids = torch.tensor([context_ids + tokenizer.encode(continuation)])
        with torch.no_grad():
            logits = theirs(ids).logits.log_softmax(-1)
        places = torch.arange(len(context_ids), ids.shape[1])
        assert total == pytest.approx(logits[0, places - 1, ids[0, places]].sum().item(), abs=1e-3)


def test_what_can_not_be_read_is_refused(pair):
    _, theirs = pair("gated-token")
    tokens_BT = tokens_of(2, 9)
    state = theirs(tokens_BT, use_cache=True).to_tuple()[-1]
    assert state
    for problem, given in {
        "at least one column": {"input_ids": tokens_BT[:, :0]},
        r"of at least the 2 x 9 given, not \(2, 5\)": {"attention_mask": torch.ones(2, 5)},
        r"not \(1, 9\)": {"attention_mask": torch.ones(1, 9)},
        "the state has 2 rows and the input 1": {"input_ids": tokens_BT[:1], "past_key_values": state},
        "is an InfiniCache, not a tuple": {"past_key_values": (1,)},
        "a row is one document here": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])},
        "are not kept": {"output_hidden_states": True},
    }.items():
        with pytest.raises(ValueError, match=problem):
            theirs(**{"input_ids": tokens_BT, **given})
    assert theirs(tokens_BT, logits_to_keep=20).logits.shape == (2, 9, 40)
    embeds = theirs.get_input_embeddings()(tokens_BT)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(theirs.generate(inputs_embeds=embeds, **settings), theirs.generate(tokens_BT, **settings)[:, 9:])


def test_a_new_model_forgets_nothing_at_first(pair):
    _, theirs = pair("gated")
    fresh = transformers.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True)
    for layer in fresh.model.layers:
        attention = layer.self_attn
        assert attention.linear_decay.bias.eq(8).all() and attention.linear_decay.weight.eq(0).all()
        assert attention.linear_strength.bias.eq(0).all() and attention.q_proj.weight.std() > 0.01
    tokens_BT = tokens_of(1, 40)
    kept = fresh(tokens_BT, use_cache=True).to_tuple()[-1].states[0].memory_BKDE
    assert kept.norm() > 0


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"pattern": ["zzz"]}, "pattern: must name attentions"),
        (
            {"attentions": {"a": {"kind": "memorizing"}}, "pattern": ["a"]},
            "attentions: 'a' must have a kind of infini, ",
        ),
        ({"rope": {"factor": 2.0}}, "rope: theta is missing"),
        ({"rope": 3}, "rope and attentions must be objects"),
        ({"head_dim": "x"}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_strange_config_is_refused(fields, problem, pair, edit, tmp_path):
    pair("gated-token", vocab_size=260)
    edit(tmp_path / "hf", **fields)
    with pytest.raises(ConfigError, match=problem):
        import_folder(tmp_path / "hf", tmp_path / "run2", tokenizer="byte")
    assert not (tmp_path / "run2").exists()


def test_the_code_that_a_folder_names_is_not_passed_on(pair, edit, tmp_path):
    pair("gated-token", vocab_size=260)
    edit(tmp_path / "hf", auto_map={"AutoModelForCausalLM": "another/place--code.Model"})
    import_folder(tmp_path / "hf", tmp_path / "run2", tokenizer="byte")
    export_checkpoint(open_checkpoint(resolve(tmp_path / "run2")), tmp_path / "hf2")
    described = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert described["auto_map"]["AutoModelForCausalLM"] == "modeling_infini.InfiniForCausalLM"


def test_what_the_code_lacks_is_refused(tiny, write_checkpoint, tmp_path, process_groups):
    write_checkpoint(tmp_path / "run", tiny("memorizing"))
    with pytest.raises(ConfigError, match=r"model\.attention\.kind: memorizing is no attention that the exported code"):
        export_checkpoint(open_checkpoint(resolve(tmp_path / "run")), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("variant", ["gated-token", "mixed", "transformer-xl"])
def test_out_and_in_again_is_lossless(variant, pair, tmp_path):
    """Every bit of the weights, and the attention of every layer; and out once more."""
    ours, _ = pair(variant, vocab_size=260)
    import_folder(tmp_path / "hf", tmp_path / "again", tokenizer="byte")
    checkpoint = open_checkpoint(resolve(tmp_path / "again"))
    model = validate(checkpoint.config).model
    assert [each.kind for each in model.layers] == [each.kind for each in ours.config.layers]
    mine = dict(ours.named_parameters())
    for piece, values in checkpoint.read(checkpoint.whole(name, "master", torch.float32) for name in mine):
        assert torch.equal(values.view(piece.global_shape), mine[piece.name]), piece.name
    export_checkpoint(checkpoint, tmp_path / "hf2")
    trees = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "hf2")]
    assert trees[0].items() <= trees[1].items()  # and the ids of bos and eos of the tokenizer that was given
    codes = [(tmp_path / name / "modeling_infini.py").read_text() for name in ("hf", "hf2")]
    assert codes[0] == codes[1]
    assert (tmp_path / "hf2" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    continued = load_run(str(tmp_path / "again" / "continue.yaml")).model
    assert continued.attention == model.attention


def test_the_mixed_case_has_every_kind(tiny):
    attention = tiny("mixed").attention
    assert isinstance(attention, MixedConfig)
