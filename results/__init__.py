"""The claims of the papers on data: what they say, the runs that decide them, and the pages.

    python -m results run --data=DIR [--only=H1,U1] [--hours=H] [--device=cpu]
    python -m results report

`claims.toml` lists the claims. `run` trains what is missing and leaves one JSON file for each run
in docs/results/runs; `report` makes the pages and pictures of docs/results from these files alone.
"""
