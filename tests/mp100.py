"""The one maker of miniature MP-100 folders: photos of noise, annotations and descriptions."""

import json

import numpy as np
from PIL import Image

from chat import Category

BOX = (10, 15, 56, 50)  # of every instance: x, y, width, height


def describe(name, keypoints):
    """A Category with made-up descriptions."""
    return Category(name, [(keypoint, f"the {keypoint} of a {name}") for keypoint in keypoints])


WAGON = describe("wagon", ["front wheel", "rear wheel", "roof", "shaft", "lamp"])
KITE = describe("kite", ["tip", "tail", "left corner"])
CATEGORIES = {1: WAGON, 2: KITE}


def make_mp100(folder, categories, instances, splits=(1,), is_visible=lambda i, k: True):
    """Fills a folder as data/mp100 is, with a descriptions.json beside images/ and annotations/.

    categories: {id: Category}. instances: how many of each category in each subset, {"train": {1: 3, 2: 3}}.
    is_visible(i, k): whether keypoint k of a subset's instance i is annotated. Every split holds the same.

    The categories of a subset take turns; annotation ids are 100 + i. Noise and points depend only on i and
    the category, so subsets with the same counts show the same instances.
    """
    for subset, counts in instances.items():
        contents = {"images": [], "annotations": [],
                    "categories": [{"id": c, "name": categories[c].name} for c in counts]}
        turns = [c for n in range(max(counts.values())) for c, count in counts.items() if n < count]
        for i, category_id in enumerate(turns):
            image, annotation = make_instance(folder, categories[category_id], category_id, i, is_visible)
            contents["images"].append(image)
            contents["annotations"].append(annotation)
        for split in splits:
            write_json(folder / "annotations" / f"mp100_split{split}_{subset}.json", contents)
    used = {category_id for counts in instances.values() for category_id in counts}
    write_descriptions(folder / "descriptions.json", {c: categories[c] for c in sorted(used)})
    return folder


def make_wagons_and_kites(folder):
    """Three wagons of 5 points and three kites of 3 by turns, the same in train and test.

    The second point of the third, annotation 102, is hidden.
    """
    counts = {1: 3, 2: 3}
    return make_mp100(folder, CATEGORIES, {"train": counts, "test": counts},
                      is_visible=lambda i, k: (i, k) != (2, 1))


def make_instance(folder, category, category_id, i, is_visible):
    """Writes a photo -> its entries among an annotation file's images and annotations."""
    rng = np.random.default_rng((category_id, i, 1))
    file = f"{category.name}/{i}.jpg"
    width, height = 120 - 10 * (i % 5), 80
    path = folder / "images" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(0, 256, (8, width // 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)

    keypoints = []
    for k in range(len(category.keypoints)):
        x, y = rng.uniform(20, 60, 2).round(1).tolist()  # within the box
        keypoints += [x, y, 2] if is_visible(i, k) else [0, 0, 0]
    image = {"id": i, "file_name": file, "width": width, "height": height}
    annotation = {"id": 100 + i, "image_id": i, "category_id": category_id, "iscrowd": 0,
                  "bbox": BOX, "area": BOX[2] * BOX[3],
                  "keypoints": keypoints, "num_keypoints": sum(v > 0 for v in keypoints[2::3])}
    return image, annotation


def write_descriptions(path, categories):
    """{id: Category} -> a descriptions.json with a keypoint set for each category."""
    sets = {category.name: [{"name": name, "description": description}
                            for name, description in category.keypoints]
            for category in categories.values()}
    entries = {str(category_id): {"name": category.name, "keypoint_set": category.name}
               for category_id, category in categories.items()}
    write_json(path, {"keypoint_sets": sets, "categories": entries})


def write_json(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))
