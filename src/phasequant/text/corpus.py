"""Where text comes from: built in, a file, or a Hub data set. Returns one string and where it came from.

Built in is the English of the standard library's `pydoc_data.topics` (the help texts of the language reference): about
465,000 characters that every Python has, split by topic in alternation into a calibration and an evaluation part.
It differs between Python versions, so its figures compare within one machine only; for figures to publish, give a file.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phasequant.errors import PhaseQuantError

Part = Literal["calibration", "evaluation"]
BUILTIN = "builtin"
HUB_NAMES = ("wikitext2", "c4")


@dataclass(frozen=True)
class Corpus:
    """A text and its origin; `sha256` is of the UTF-8 text."""

    source: str
    text: str

    @property
    def sha256(self) -> str:
        """Digest that goes into manifests."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def builtin(part: Part) -> Corpus:
    """The built-in text: topics in alphabetical order, even ones to calibrate on, odd ones to evaluate on."""
    from pydoc_data.topics import topics

    names = sorted(topics)[0 if part == "calibration" else 1 :: 2]
    return Corpus(f"{BUILTIN}:{part}", "\n\n".join(topics[name].strip() for name in names))


def from_file(path: Path) -> Corpus:
    """Any UTF-8 text file, as it is."""
    try:
        text = path.read_bytes().decode("utf-8")
    except IsADirectoryError as error:
        raise PhaseQuantError(f"the text {path} is a directory: give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise PhaseQuantError(f"the text {path} is not UTF-8 (byte {error.start}): convert it first") from error
    except OSError as error:
        raise PhaseQuantError(f"the text {path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise PhaseQuantError(f"the text {path} is empty: give a file with some text in it")
    return Corpus(str(path), text)


def _from_hub(name: str, part: Part) -> Corpus:
    """WikiText-2 or C4 by the protocol of GPTQ (arXiv 2210.17323) and QuaRot (arXiv 2404.00456)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PhaseQuantError(
            f"the text '{name}' is a Hub data set and needs `pip install 'phasequant[eval]'`; "
            "or give a text file instead"
        ) from error
    split = "train" if part == "calibration" else ("test" if name == "wikitext2" else "validation")
    try:
        if name == "wikitext2":
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
            return Corpus(f"{name}:{split}", "\n\n".join(rows))
        shard = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
        data = load_dataset("allenai/c4", data_files={split: shard}, split=split)
        return Corpus(f"{name}:{split}", " ".join(data[:1100]["text"]))
    except Exception as error:
        raise PhaseQuantError(
            f"the data set '{name}' could not be loaded ({type(error).__name__}: {error}); "
            "without network give a text file instead"
        ) from error


def find(source: str, part: Part) -> Corpus:
    """`builtin`, a file's path, `wikitext2` or `c4`."""
    if source == BUILTIN:
        return builtin(part)
    if source in HUB_NAMES and not Path(source).exists():
        return _from_hub(source, part)
    path = Path(source).expanduser()
    if not path.exists():
        raise PhaseQuantError(
            f"the text '{source}' does not exist: give a UTF-8 file, or one of {BUILTIN}, {', '.join(HUB_NAMES)}"
        )
    return from_file(path)
