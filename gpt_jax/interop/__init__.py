"""Export to and import from other formats (weights, graphs, tokenizers), and the verification of exports."""
