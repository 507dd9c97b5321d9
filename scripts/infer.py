"""Text in, text out: `python scripts/infer.py --gin.infer.model_dir=runs/demo/lora < in.txt`."""

from t5x_lite import configure
from t5x_lite.train.infer import infer

if __name__ == "__main__":
    configure.main(infer)
