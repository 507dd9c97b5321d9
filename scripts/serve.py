"""A page and a JSON API to try a model: `python scripts/serve.py --model_dir=runs/demo/lora`."""

from t5x_lite import configure
from t5x_lite.serving.serve import serve

if __name__ == "__main__":
    configure.main(serve)
