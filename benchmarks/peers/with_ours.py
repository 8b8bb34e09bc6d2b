"""dist_train."""

from jobs import BATCH, CONTEXT, CROP, FOLDER, JOB, LR, MEAN, STD, STEPS, dataset, model

import dist_train

DATA = {
    "jpeg": {
        "name": "image_folder",
        "root": str(FOLDER / "photos"),
        "train_transform": [{"RandomResizedCrop": {"size": CROP}}, "RandomHorizontalFlip"],
        "eval_transform": [{"Resize": {"size": CROP}}, {"CenterCrop": {"size": CROP}}],
        "mean": MEAN,
        "std": STD,
    },
    "gpt": {
        "name": "text",
        "root": str(FOLDER / "text.txt"),
        "args": {"context": CONTEXT},
        "eval_fraction": 0.1,
    },
}
config = {
    "run": {"dir": str(FOLDER / "ours")},
    "data": DATA.get(JOB, {}),
    "task": {"name": "language" if JOB == "gpt" else "classification"},
    "optim": {"name": "SGD", "lr": LR},
    "train": {"batch_size": BATCH, "steps": STEPS},
    "device": "cpu",
}
data = None if JOB in DATA else dataset()
dist_train.fit(config, model=model(), train_data=data, eval_data=data)
