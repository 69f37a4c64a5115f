"""The samples in traces/data/: `python -m kvtraces.samples FOLDER` writes them again, byte for byte."""

import argparse
from pathlib import Path

from kvtraces.workloads import Agent, Bursty, Chat, Config, Poisson, Rag, Spread, generate
from kvtraces.writer import write

SAMPLES: dict[str, Config] = {
    "chat": Chat(
        requests=1500,
        seed=20,
        arrivals=Bursty(sessions_per_s=0.4),
        system_prompts=60,
        zipf=0.8,
        system_tokens=Spread(median=350, sigma=0.6, high=3000),
        turns=3.5,
        user_tokens=Spread(median=90, sigma=1.0, high=2000),
        output_tokens=Spread(median=200, sigma=0.7, high=1000),
    ),
    "rag": Rag(
        requests=1200,
        seed=21,
        arrivals=Poisson(sessions_per_s=1.5),
        documents=1000,
        template_tokens=Spread(median=300, sigma=0.4, high=2000),
        document_tokens=Spread(median=350, sigma=0.4, low=64, high=2000),
        documents_per_request=3,
    ),
    "agent": Agent(
        requests=1200,
        seed=22,
        arrivals=Poisson(sessions_per_s=0.02),
        tool_definition_tokens=1500,
        system_tokens=Spread(median=800, sigma=0.3, high=4000),
        task_tokens=Spread(median=150, sigma=0.8, high=4000),
        steps=16.0,
        tool_tokens=Spread(median=250, sigma=1.0, low=8, high=4000),
        output_tokens=Spread(median=120, sigma=0.7, high=2000),
        max_context_tokens=16_000,
        summary_tokens=Spread(median=1000, sigma=0.3, high=4000),
    ),
}
"""Smaller contexts than the generator's defaults, to keep the folder to a few hundred kB."""


def main() -> None:
    """Write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for name, config in SAMPLES.items():
        path = folder / f"{name}.jsonl.gz"
        path.unlink(missing_ok=True)
        write(generate(config), path)


if __name__ == "__main__":
    main()
