"""model.gguf from an exported folder, by llama.cpp's own converter, and right for SentencePiece without a first space.

llama.cpp puts a space before every text unless the file says otherwise. Its converter takes that from
tokenizer_config.json for a Llama, and from nowhere for a Qwen3; so what it leaves out is added here.
"""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import console

KEY = "tokenizer.ggml.add_space_prefix"
NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def command(converter: Path, folder: Path, dtype: str) -> list[str]:
    """How llama.cpp's convert_hf_to_gguf.py is called for `folder`."""
    names = [str(converter), str(folder), "--outfile", str(folder / "model.gguf"), "--outtype", NAMES[dtype]]
    return [sys.executable, *names]


def instructions(folder: Path, dtype: str) -> str:
    """What to type for a GGUF file, and for one in four bits."""
    typed = " ".join(command(Path("llama.cpp/convert_hf_to_gguf.py"), folder, dtype)[1:])
    if puts_space(folder) is False:
        run = f"  llama-server -m {folder / 'model.gguf'} --jinja --override-kv {KEY}=bool:false"
    else:
        run = f"  llama-server -m {folder / 'model.gguf'} --jinja"
    return "\n".join(
        (
            "for GGUF, with a checkout of llama.cpp (the first line is what --llama_cpp DIR does):",
            f"  python {typed}",
            f"  llama-quantize {folder / 'model.gguf'} {folder / 'model-q4_k_m.gguf'} Q4_K_M",
            run,
        )
    )


def find_converter(checkout: Path) -> Path:
    """The converter in a checkout of llama.cpp. Raises UserError."""
    converter = checkout / "convert_hf_to_gguf.py"
    if not converter.is_file():
        raise console.UserError(f"--llama_cpp {checkout}: no convert_hf_to_gguf.py in it; give a checkout of llama.cpp")
    return converter


def convert(converter: Path, folder: Path, dtype: str) -> None:
    """Write model.gguf into `folder`. Raises UserError with what the converter says, and for unigram tokenizers."""
    if (folder / "tokenizer.model").is_file() and proto(folder).trainer_spec.model_type == 1:
        raise console.UserError("--llama_cpp: llama.cpp reads SentencePiece models as BPE, and this one is unigram")
    child = subprocess.run(command(converter, folder, dtype), capture_output=True, text=True, check=False)
    if child.returncode:
        said = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise console.UserError(f"{converter} failed: {said}")
    if puts_space(folder) is False:
        say_no_space(folder / "model.gguf")


def puts_space(folder: Path) -> bool | None:
    """Whether the folder's SentencePiece model puts a space before every text; None where it has none."""
    if not (folder / "tokenizer.model").is_file():
        return None
    return bool(proto(folder).normalizer_spec.add_dummy_prefix)


def proto(folder: Path) -> Any:
    """What the folder's tokenizer.model holds."""
    from data import tokenizer

    return tokenizer.model_proto((folder / "tokenizer.model").read_bytes())


def say_no_space(path: Path) -> None:
    """Add KEY, false, to the GGUF file at `path`, unless it says something already."""
    try:
        import gguf
        from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
    except ImportError:
        raise console.UserError("--llama_cpp: needs one package more: pip install 'llm-gacha[gguf]'") from None
    reader = gguf.GGUFReader(path)
    if KEY in reader.fields:
        return
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, arch=reader.fields["general.architecture"].contents(), endianess=reader.endianess)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        copy_with_new_metadata(reader, writer, {KEY: MetadataDetails(gguf.GGUFValueType.BOOL, False)}, [])
    part.replace(path)
