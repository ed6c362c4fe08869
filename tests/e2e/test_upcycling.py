"""From a dense Hugging Face directory to a trained MoE one, by the three commands of the README."""

from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ext.checkpoint.tokenizer_files import copy_tokenizer
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from tests.support.commands import TOOLS, command, train
from tests.support.workspace import reported_losses, write_corpus

LAYOUT = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
)
SMALL = (
    "train.train_iters=3",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "data.sequence_length=64",
    "schedule.warmup_iters=1",
    "runtime.device=cpu",
    "runtime.threads=1",
)


def dense_directory(directory: Path) -> Path:
    """A small Llama with its tokenizer, as one would download it, and prepared data beside it."""
    corpus = write_corpus(directory / "corpus.jsonl")
    train_tokenizer([corpus], directory / "tokenizer", 330)
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    dense = directory / "llama"
    LlamaForCausalLM(config).save_pretrained(dense)
    copy_tokenizer(directory / "tokenizer", dense)
    preprocess([corpus], dense, directory / "data", split=(0.8, 0.1, 0.1))
    return dense


def test_three_commands_from_a_dense_directory_to_a_trained_moe(tmp_path: Path) -> None:
    dense = dense_directory(tmp_path)
    upcycled = command(TOOLS / "upcycle.py", dense, tmp_path / "upcycled", "--num-experts", "4")
    assert upcycled.returncode == 0, upcycled.stderr
    assert "function: kept, up to the rounding of fp32" in upcycled.stdout

    data = f"data.train=[{{path: {tmp_path / 'data' / 'train'}}}]"
    trained = train(4, tmp_path / "upcycled.yaml", data, *LAYOUT, *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert len(reported_losses(tmp_path / "upcycled-trained")) == 3

    exported = command(TOOLS / "convert.py", tmp_path / "upcycled-trained", tmp_path / "hf", "--verify")
    assert exported.returncode == 0, exported.stderr
    print(exported.stdout)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert network.config.num_experts == 4
