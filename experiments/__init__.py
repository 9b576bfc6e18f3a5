"""The paper's experiments, one file each; results as JSON in `results/`. Never imported by the package."""
