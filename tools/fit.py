"""Labels held against their photos: which are there, how large, which way up, and where points and boxes lie.

A well-formed file can still be wrong for the photos beside it. What can be mended is, and the rest is left
out; Notes say so. Where most of a file is wrong, an InputError says what it looks like.
"""

from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from common import InputError
from tools.formats import FRACTIONS

ORIENTATION = 0x0112  # the EXIF entry that says how a viewer turns a photo


def fit(labels, images, notes):
    """Labels -> the Photos that have objects, with path, real size, is_turned, and a box for each object."""
    photos = find_photos(labels, images, notes)
    photos = check_sizes(labels, photos, notes)
    check_points(labels, photos, notes)
    give_boxes(labels, photos, notes)
    for photo in photos:
        objects = [one for one in photo.objects if is_inside(one.box, photo)]
        if len(objects) < len(photo.objects):
            notes.add("objects whose box lies outside their photo, left out", f"one in {photo.name}")
        photo.objects = objects
    return [photo for photo in photos if photo.objects]


# ---------------------------------------------------------------------------------------------------- photos


def find_photos(labels, images, notes):
    names, found = {}, []
    for photo in (photo for photo in labels.photos if photo.objects):
        given = photo.name
        photo.path, name = find_photo(given, list_folders(photo.source, images))
        if photo.path is None:
            notes.add("photos that are not there, left out (--images says where they are)", given)
        elif names.setdefault(photo.path, given) != given:
            raise InputError(f"{labels.path}: {names[photo.path]} and {given} would both be the photo "
                             f"{photo.path}; keep the folders that tell them apart")
        else:
            photo.name = name
            found.append(photo)
    return found


def list_folders(path, images):
    """The folders in which the photos of an annotation file may be, the likeliest first."""
    name = path.stem.rpartition("_")[2]  # person_keypoints_train2017.json and train2017/
    if images:
        return [images, images / path.stem, images / name]
    bases = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    return [base / folder for base in bases for folder in (path.stem, name, f"images/{name}", "", "images")]


def find_photo(name, folders):
    """labeled-data/video/a.png -> where that, video/a.png or a.png is, and which of them; or None, None.

    Tools put their own folders before a photo's name: images/a.jpg, /data/upload/1/a.jpg, ../../media/a.jpg.
    """
    parts = PurePosixPath(name).parts
    for n in range(len(parts)):
        for folder in folders if n == 0 or ".." not in parts[n:] else ():
            if (path := Path(folder, *parts[n:])).is_file():
                return path.resolve(), "/".join(part for part in parts[n:] if part not in ("..", "/"))
    return None, None


def check_sizes(labels, photos, notes):
    """Holds the file's sizes against the photos'; finds out which are labelled upright -> those that fit.

    Most tools show a photo turned as its EXIF orientation asks, and write its upright size. Where sizes prove
    nothing, as for a photo upside down, it is as with the other photos of the file.
    """
    fitting = []
    for photo in tqdm(photos, "photos", leave=False, disable=None):
        try:
            stored, upright, is_rotated = read_photo(photo.path)
        except Exception as e:  # pillow's decoders raise nearly anything
            notes.add("photos that cannot be read, left out", f"{photo.name} ({type(e).__name__}: {e})")
            continue
        fits = [photo.size in (None, FRACTIONS, size) for size in (stored, upright)]
        if any(fits):
            fitting.append((photo, stored, upright, is_rotated, fits))
        else:
            (w, h), (width, height) = upright, photo.size
            notes.add("photos left out for their size", f"{photo.name} is {w} x {h} pixels, but {width:g} x "
                      f"{height:g} in {labels.path.name}; its points do not fit")
    proofs = {fits_upright for *_, (fits_stored, fits_upright) in fitting if fits_stored != fits_upright}
    for photo, stored, upright, is_rotated, (fits_stored, fits_upright) in fitting:
        is_open = is_rotated and fits_stored == fits_upright and photo.size != FRACTIONS
        photo.is_turned = is_rotated and fits_upright and (not is_open or proofs == {True})
        is_fraction, photo.size = photo.size == FRACTIONS, upright if photo.is_turned else stored
        if is_fraction:
            scale(photo)
        if photo.is_turned:
            notes.add("photos copied upright, as their points are", photo.name)
        elif is_open and proofs != {False}:
            notes.add("warning: photos with an EXIF orientation, which is ignored, so their points must have "
                      "been made on the unturned pixels", photo.name)
    return [photo for photo, *_ in fitting]


def read_photo(path):
    """-> its size as it is stored, its size upright, and whether its EXIF orientation turns it.

    It is read to its end, since one that breaks off would stop a training later; a JPEG at an eighth of its
    size, which is fast.
    """
    with Image.open(path) as photo:
        size = photo.size
        photo.draft(None, (1, 1))
        photo.load()
        orientation = photo.getexif().get(ORIENTATION, 1)
    is_rotated = orientation in range(2, 9)  # tools also write 0 and other numbers
    return size, size[::-1] if is_rotated and orientation >= 5 else size, is_rotated


def scale(photo):
    """Points and boxes that are fractions -> pixels."""
    w, h = photo.size
    for one in photo.objects:
        one.points = {name: (x * w, y * h, v) for name, (x, y, v) in one.points.items()}
        one.box = one.box and (one.box[0] * w, one.box[1] * h, one.box[2] * w, one.box[3] * h)


# ------------------------------------------------------------------------------------------- points and boxes


def check_points(labels, photos, notes):
    """Counts the points outside their photos."""
    points = [(x, y, photo) for photo in photos for one in photo.objects for x, y, _ in one.points.values()]
    outside = [f"{x:g}, {y:g} in {photo.name}, which is {photo.size[0]} x {photo.size[1]} pixels"
               for x, y, photo in points if not (0 <= x <= photo.size[0] and 0 <= y <= photo.size[1])]
    farthest = max((max(x, y) for x, y, _ in points), default=0)
    if len(points) > 1 and 0 <= farthest <= 1:
        raise InputError(f"{labels.path}: no coordinate is above 1: fractions of width and height? Pixels "
                         "are wanted")
    if 2 * len(outside) > len(points):
        raise InputError(f"{labels.path}: {len(outside)} of {len(points)} points lie outside their photos, "
                         f"e.g. {outside[0]}; were they made on photos of another size?")
    if len(points) > 9 and farthest <= 100 and all(min(photo.size) >= 300 for photo in photos):
        notes.add("warning: no coordinate is above 100; percent? Pixels are wanted", labels.path.name)
    for where in outside:
        notes.add("points outside their photos, which cannot be found", where)


def give_boxes(labels, photos, notes):
    """Makes the boxes that are absent, and those that are no more than the extent of the points.

    CVAT, Label Studio and SLEAP write such boxes. A crop of one cuts off what the outermost points lie on.
    """
    objects = [(photo, one) for photo in photos for one in photo.objects]
    several = [one for _, one in objects if one.box and len(one.points) > 1]
    hugging = [one for one in several if hugs(one)]
    if several and len(hugging) >= 0.9 * len(several):
        notes.add("files whose boxes are the mere extent of the points; a margin of an eighth is added",
                  f"{labels.path.name} ({len(hugging)} of {len(several)} boxes)")
        for one in hugging:
            one.box = None
    seen = [in_crop(point, one.box) for _, one in objects if one.box for point in one.points.values()]
    n_outside = seen.count(False)
    if 2 * n_outside > len(seen):
        raise InputError(f"{labels.path}: {n_outside} of {len(seen)} points lie outside their boxes; are "
                         "these x, y, width and height in pixels?")
    if n_outside:
        notes.add("points outside the square around their box, which are not trained on",
                  f"{n_outside} of {len(seen)} in {labels.path.name}")
    for photo, one in objects:
        one.box = one.box or make_box(one, photo)


def hugs(one):
    """Whether an object's box is the extent of its points, to a pixel or a hundredth."""
    x, y, w, h = one.box
    xs, ys, _ = zip(*one.points.values())
    tolerance = max(1.5, max(w, h) / 100)
    return all(abs(a - b) <= tolerance for a, b in (
        (x, min(xs)), (y, min(ys)), (x + w, max(xs)), (y + h, max(ys))))


def in_crop(point, box):
    x, y, w, h = box
    return all(abs(p - middle) <= max(w, h) / 2 for p, middle in zip(point, (x + w / 2, y + h / 2)))


def make_box(one, photo):
    """The extent of the points with an eighth of its size around, which is the median of MP-100's boxes."""
    xs, ys, _ = zip(*one.points.values())
    size = max(max(xs) - min(xs), max(ys) - min(ys))
    margin = max(1, size / 8) if size else min(photo.size) / 20  # a single point
    x, y = max(0, min(xs) - margin), max(0, min(ys) - margin)
    return x, y, max(xs) + margin - x, max(ys) + margin - y


def is_inside(box, photo):
    """Whether anything of a box is left when it is cut at the photo's edges, as MP-100's are."""
    return all(min(size - 1, max(0, start) + extent - 1) > max(0, start)
               for start, extent, size in zip(box[:2], box[2:], photo.size))
