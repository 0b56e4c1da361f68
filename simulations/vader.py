"""The default scenario's data: sentences in four domains, each rated by twenty people (Hutto and Gilbert 2014).

They lie in the source distribution of the package vaderSentiment (MIT licence), which pip brings once.
Ratings run from -4 to 4; a text whose mean rating is nearer to 0 than 0.5 is neutral and left out, the
others are positive or negative by its sign.
"""

import hashlib
import io
import tarfile
from dataclasses import dataclass

from shared import packages
from shared.errors import DataError

REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {  # site name: (the domain's name in the split's hash, its file)
    "tweets": ("tweets", "tweets_GroundTruth.txt"),
    "film-reviews": ("movie", "movieReviewSnippets_GroundTruth.txt"),
    "product-reviews": ("amazon", "amazonReviewSnippets_GroundTruth.txt"),
    "editorials": ("nyt", "nytEditorialSnippets_GroundTruth.txt"),
}
NEUTRAL = 0.5


@dataclass(frozen=True)
class Sentence:
    """One rated text. `document` is the review or editorial that it is a sentence of."""

    id: str
    document: str
    text: str
    rating: float

    @property
    def label(self) -> str:
        """The sign of the mean rating."""
        return "positive" if self.rating > 0 else "negative"


def sentences() -> dict[str, list[Sentence]]:
    """Return the rated, not neutral sentences of each domain, each text once.

    Raises
    ------
    DataError
        Where the package cannot be brought, or is not the pinned one.
    """
    source = packages.fetch(REQUIREMENT, sha256=SHA256, source=True)
    found: dict[str, list[Sentence]] = {}
    seen: set[str] = set()
    with (
        tarfile.open(source) as package,
        tarfile.open(fileobj=io.BytesIO(_read(package, ARCHIVE))) as archive,
    ):
        for domain, (short, file) in DOMAINS.items():
            found[domain] = []
            for line in _read(archive, f"hutto_ICWSM_2014/{file}").decode("utf-8").splitlines():
                number, rating, text = line.split("\t", 2)
                document = f"{short}:{number.partition('_')[0]}"
                sentence = Sentence(f"{domain}/{number}", document, text.strip(), float(rating))
                if abs(sentence.rating) >= NEUTRAL and sentence.text and sentence.text not in seen:
                    seen.add(sentence.text)
                    found[domain].append(sentence)
    return found


def split(domains: dict[str, list[Sentence]]) -> tuple[dict[str, list[Sentence]], dict[str, list[Sentence]]]:
    """Split each domain into what its site holds and public test sentences: a fifth of the documents, by a hash.

    The split is fixed, whatever the run's seed: scores of different runs are on the same test set.
    """
    sites: dict[str, list[Sentence]] = {domain: [] for domain in domains}
    test: dict[str, list[Sentence]] = {domain: [] for domain in domains}
    for domain, members in domains.items():
        for sentence in members:
            number = int(hashlib.sha256(sentence.document.encode()).hexdigest(), 16) % 100
            (test if number >= 80 else sites)[domain].append(sentence)
    return sites, test


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{REQUIREMENT} holds no {name}; it is not the pinned package.")
    return member.read()
