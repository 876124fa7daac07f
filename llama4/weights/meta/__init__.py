"""Meta's own layout: `params.json` and one `consolidated.NN.pth` per model-parallel rank."""
