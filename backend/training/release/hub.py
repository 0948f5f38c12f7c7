"""A released version as a Hugging Face repository: what others can load without this project."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.ml.artifacts import ModelRecord, read_state, report_folder_name
from app.ml.durable import write_durably
from app.ml.model import TIMM, backbone, build_model, head_linear
from app.ml.predictor import FoodPredictor, TorchNetwork, load_model_for_inference
from app.ml.timm_networks import import_timm
from training.release.standalone import answers_of, facts_of
from training.release.standalone_formats import Exported, checked

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # as the hub names them
LOADING = {
    "timm": """import timm

model = timm.create_model("hf-hub:YOU/NAME", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
labels = model.pretrained_cfg["label_names"]
""",
    "torchvision": """import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torchvision import transforms
from torchvision.models import get_model

folder = Path(snapshot_download("YOU/NAME"))
config = json.loads((folder / "config.json").read_text())
model = get_model(config["architecture"], num_classes=config["num_classes"]).eval()
model.load_state_dict(load_file(folder / "model.safetensors"))
facts = config["nutrilearn"]
transform = transforms.Compose([
    transforms.Resize(facts["resize"], transforms.InterpolationMode(facts["interpolation"])),
    transforms.CenterCrop(facts["crop"]),
    transforms.ToTensor(),
    transforms.Normalize(facts["mean"], facts["std"]),
])
labels = config["label_names"]
""",
}


def export_hub(model_dir: Path, version: int, folder: Path) -> list[Exported]:
    """Write the weights, what the network is and a card; then load the weights and run them."""
    import_timm()  # first, with the usage reports of its hub switched off
    from safetensors.torch import load_file, save

    predictor = load_model_for_inference(model_dir, version, runtime="torch")
    record = predictor.record
    model = build_model(record.model_name, len(record.classes))
    weights = save(read_state(model_dir, record), metadata={"format": "pt"})
    write_durably(folder / WEIGHTS, weights)
    config = hub_config(record, model)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_durably(folder / CONFIG, text.encode())
    card = model_card(record, config, model_dir / report_folder_name(version) / "MODEL_CARD.md")
    write_durably(folder / CARD, card.encode())

    model.load_state_dict(load_file(folder / WEIGHTS))
    network = TorchNetwork(model, record.model_name, torch.device("cpu"))
    again = FoodPredictor(record, network, predictor.centroids)
    return [checked(folder / WEIGHTS, predictor, partial(answers_of, again))]


def library_of(model_name: str) -> str:
    """Say whose module the network is, which is what its state_dict loads into."""
    return "timm" if model_name.startswith((TIMM, "efficientnet_lite")) else "torchvision"


def hub_config(record: ModelRecord, model: nn.Module) -> dict[str, Any]:
    """Describe the network as timm does, whose `create_model` reads this; torchvision's alike."""
    pretrained = getattr(model, "pretrained_cfg", {"architecture": record.model_name})
    preprocessing, head = record.preprocessing, backbone(record.model_name).head
    return {
        "architecture": pretrained["architecture"],
        "num_classes": len(record.classes),
        "num_features": head_linear(model, record.model_name).in_features,
        "label_names": record.classes,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, preprocessing.crop, preprocessing.crop],
            "fixed_input_size": pretrained.get("fixed_input_size", False),
            "interpolation": preprocessing.interpolation,
            # The short side becomes int(crop / crop_pct), which must not round below `resize`.
            "crop_pct": math.nextafter(preprocessing.crop / preprocessing.resize, 0),
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(record.classes),
            "first_conv": pretrained.get("first_conv"),
            "classifier": head,
        },
        "nutrilearn": facts_of(record),
    }


def model_card(record: ModelRecord, config: dict[str, Any], report: Path) -> str:
    """Put the header that the hub reads before the version's card, and the loading behind it.

    report: MODEL_CARD.md, which a version may lack.
    """
    from huggingface_hub import EvalResult, ModelCardData

    library = library_of(record.model_name)
    name = config["nutrilearn"]["name"]
    results = [
        EvalResult("image-classification", "imagefolder", "test photos", "accuracy", top1)
        for top1 in [record.metrics.get("test_top1")]
        if top1 is not None
    ]
    header = ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        tags=["image-classification", "food", library],
        model_name=name if results else None,
        eval_results=results or None,
    )
    body = report.read_text(encoding="utf-8") if report.exists() else f"# {name}\n"
    loading = f"## Loading it\n\n```python\n{LOADING[library]}```\n"
    return f"---\n{header.to_yaml()}\n---\n\n{body.rstrip()}\n\n{loading}"
