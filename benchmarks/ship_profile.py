"""Make a shipped profile of a measured one: with the tiers below L1, and batches larger than were measured.

    python benchmarks/ship_profile.py MEASURED.json --like TABLES.json --out kvsim/profiles/data/h100-qwen3-8b.json

MEASURED comes from profile_h100.py. Links are those of TABLES, a shipped profile on the same GPU: its copies are the
pinned ones that the kernels were held against, and those in MEASURED a start's short measurement. Where TABLES is of
the same model, batches beyond the measured ones take what it says, scaled to meet the largest measured batch at each
context.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from kvsim.profiles import Grid, load
from kvsim.profiles.load import to_json


def larger_batches(measured, tables):
    """The measured grid of decodes, and above it the tables' batches, scaled."""
    last = measured.x[-1]
    batches = [batch for batch in tables.x if batch > last]
    rows = [
        tuple(
            tables.at(batch, context) * measured.at(last, context) / tables.at(last, context) for context in measured.y
        )
        for batch in batches
    ]
    return Grid((*measured.x, *batches), measured.y, (*measured.seconds, *rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--like", type=Path, required=True, help="a shipped profile on this GPU")
    parser.add_argument("--about", default="", help="what the measured parts' sources should say beside")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    profile, like = load(given.measured), load(given.like)
    about = f"; {given.about}" if given.about else ""
    parts = {name: replace(part, source=part.source + about) for name, part in profile.provenance.items()}
    parts |= {name: like.provenance[name] for name in ("pcie", "disk", "network")}
    decode = profile.decode
    if like.model == profile.model:
        decode = larger_batches(decode, like.decode)
        larger = f"batches beyond {profile.decode.x[-1]} follow {like.provenance['decode'].source}, scaled"
        parts["decode"] = replace(parts["decode"], error=f"{parts['decode'].error}; {larger}")
    made = replace(
        profile,
        decode=decode,
        transfers=like.transfers,
        duplex=like.duplex,
        provenance=parts,
    )
    given.out.write_text(to_json(made), encoding="utf-8")
    print(f"{given.out}: {made.name}")


if __name__ == "__main__":
    main()
