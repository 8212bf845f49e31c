"""The paper's tables for any model (``pop-generate ablate``), and accuracy against measured speed."""
