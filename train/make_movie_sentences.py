"""Makes flaxmpc/data/movie_sentences.tsv.gz from the source distribution of vaderSentiment 3.2.1 (MIT).

pip download --no-deps --no-binary :all: vaderSentiment==3.2.1
python train/make_movie_sentences.py vaderSentiment-3.2.1.tar.gz
"""

import gzip
import io
import tarfile
from pathlib import Path

import tyro

OUT = Path(__file__).parent.parent / "flaxmpc" / "data" / "movie_sentences.tsv.gz"


def main(source: tyro.conf.Positional[Path], out: Path = OUT) -> None:
    """Writes rating and sentence of every movie snippet, tab-separated.

    Args:
        source: vaderSentiment-3.2.1.tar.gz.
        out: the file to write.
    """
    with tarfile.open(source) as outer:
        inner = outer.extractfile("vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as resources:
            member = resources.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode().splitlines()
    rows = [line.split("\t") for line in lines]
    text = "".join(f"{float(rating):.4f}\t{sentence.strip()}\n" for _, rating, sentence in rows)
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(rows)} sentences, {out.stat().st_size} bytes: {out.name}")


if __name__ == "__main__":
    tyro.cli(main)
