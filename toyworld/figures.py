"""README's figures, made by the code they explain: `python -m toyworld.figures` writes assets/figures/.

They show the trained toy (assets/toy) and creatures of categories that no training has seen, but for the
portrait: that is assets/real, which needs weights/dinov2-small. page.png is a screenshot.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from chat import IGNORE, Category, Scene
from common import run
from data import Crop, crop_of, normalize
from decode import load_trained, locate
from llama import rotate
from predict import Locator
from tools.draw import make_palette, place_column, wrap
from toyworld.creatures import draw_example

ROOT = Path(__file__).parent.parent
TOY, FIGURES = ROOT / "assets/toy", ROOT / "assets/figures"
PORTRAIT = ROOT / "assets/real/astronaut.jpg"  # Eileen Collins, by NASA, which is in the public domain
FACE, BOX = Crop(223, 118, 170), (172, 72, 102, 92)
SIZE = 112  # pixels of a crop: 8 x 8 patches
PHOTO, CROP = TOY / "creature.jpg", Crop(132.5, 108, 125)
INK, PALE, RED, PAPER = (40, 40, 48), (228, 228, 234), (206, 52, 52), (255, 255, 255)


def font(size):
    return ImageFont.load_default(size=size)


def show(crop, side, photo=PHOTO):
    """-> the crop as a picture of side x side pixels."""
    return Image.fromarray(crop.cut(photo, side).permute(1, 2, 0).numpy())


def dot(pen, point, radius, fill, outline=INK):
    x, y = point
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, outline, max(1, radius // 4))


def ask(model, chat, crop, keypoints, photo=PHOTO):
    """-> Predictions of the keypoints, (name, description) pairs, by the median of the distributions."""
    image, questions = normalize(crop.cut(photo, SIZE)[None]), chat.encode_questions(Category("", keypoints))
    return locate(model, image, [questions], chat, decode="median")[0]


# --------------------------------------------------------------------------------------------------- figures


def draw_descriptions(model, chat, side=520, column=560):
    """Two creatures, and beside each point what was asked for it."""
    photo = FIGURES / "creature.png"
    sheet = Image.new("RGB", (2 * (side + column), side), PAPER)
    for n, seed in enumerate((3, 8)):
        _, instance, texts = draw_example(seed, photo)
        crop, left = crop_of(instance), n * (side + column)
        sheet.paste(show(crop, side, photo), (left, 0))
        points = [side * np.array(p.point) + (left, 0) for p in ask(model, chat, crop, texts, photo)]
        write_beside(sheet, points, dict(texts), side, column, left)
    photo.unlink()
    return sheet


def draw_portrait(vit="weights/dinov2-small", side=520, column=620):
    """A photograph, and beside each point what was asked for it."""
    texts = {"right eye": "the middle of the eye on the person's own right side",
             "left eye": "the middle of the eye on the person's own left side",
             "nose": "the tip of the nose, above the mouth",
             "right mouth corner": "the corner of the mouth on the person's own right side, below the nose",
             "left mouth corner": "the corner of the mouth on the person's own left side, below the nose"}
    found = Locator(PORTRAIT.parent / "ckpt.pt", "median", vit=vit)(PORTRAIT, texts, BOX)
    points = [side * FACE.from_photo(np.array((p.x, p.y))) for p in found.values()]
    sheet = Image.new("RGB", (side + column, side), PAPER)
    sheet.paste(show(FACE, side, PORTRAIT))
    write_beside(sheet, points, texts, side, column)
    return sheet


def write_beside(sheet, points, texts, side, column, left=0):
    """Points of a picture at `left`, `side` wide, joined to texts, {name: text}, in a column on its right."""
    pen = ImageDraw.Draw(sheet)
    ends = place_column(points, left + side + 14, side / len(texts), side)
    for point, (x, y), colour, text in zip(points, ends, make_palette([*texts]), texts.values()):
        pen.line((*point, x, y), INK, 2)
        dot(pen, point, 9, colour)
        dot(pen, (x + 8, y), 9, colour)
        lines = wrap(text, 25, column - 60)
        for i, line in enumerate(lines):
            pen.text((left + side + 40, y + 29 * (i - (len(lines) - 1) / 2)), line, INK, font(25), "lm")


def draw_words(model, chat, side=360):
    """The same photo and the same name, three descriptions, three points."""
    texts = ["the knob on the antenna that is purple", "the sharp end of the green horn",
             "the orange heart painted on the body"]
    found = ask(model, chat, CROP, [("first mark", text) for text in texts])
    sheet = Image.new("RGB", (3 * (side + 24) - 24, side + 100), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, (text, prediction) in enumerate(zip(texts, found)):
        left = n * (side + 24)
        sheet.paste(show(CROP, side), (left, 0))
        dot(pen, side * np.array(prediction.point) + (left, 0), 11, RED, PAPER)
        pen.text((left, side + 14), "where is the first mark?", INK, font(20))
        for i, line in enumerate(wrap(f"Reference: {text}", 20, side)):
            pen.text((left, side + 40 + 26 * i), line, RED, font(20))
    return sheet


def draw_crop(side=400):
    """The photo with its box and two crops: the one of a test, and one of training."""
    photo = Image.open(PHOTO).convert("RGB")
    scale = side / photo.height
    photo = photo.resize((round(photo.width * scale), side), Image.Resampling.BICUBIC)
    turned = Crop(CROP.x, CROP.y, 1.12 * CROP.side, np.radians(24))
    sheet = Image.new("RGB", (photo.width + 2 * (side + 24), side + 40), PAPER)
    sheet.paste(photo)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([scale * v for v in (70, 52, 195, 164)], outline=INK, width=3)
    for n, (crop, colour, text) in enumerate((
            (CROP, (36, 110, 200), "crop of a test: the box made square"),
            (turned, RED, "crop of training: scaled and turned"))):
        corners = scale * crop.to_photo([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
        pen.line([tuple(corner) for corner in corners], colour, 4, joint="curve")
        left = photo.width + 24 + n * (side + 24)
        sheet.paste(show(crop, side), (left, 0))
        pen.rectangle((left, 0, left + side - 1, side - 1), outline=colour, width=4)
        pen.text((left, side + 10), text, colour, font(22))
    pen.text((0, side + 10), "photo and box", INK, font(22))
    return sheet


def draw_sequence(chat, width=1640):
    """A conversation as the LLM gets it: BOS, the patches, words. What is learned is red."""
    knob = ("antenna ball", "the knob on the antenna that is purple")
    scene = Scene(Category("creature", [knob]), [(knob, (0.83, 0.402))])
    tokens, labels = chat.encode_conversation(scene)
    names = [chat.tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "\u00b7") for token in tokens]
    chips = [("BOS", IGNORE), *[(patch, None) for patch in range(64)], *zip(names[1:], labels[1:])]
    crop, places, x, y, size = show(CROP, 8 * 40), [], 0, 0, 40
    for what, _ in chips:
        w = size if isinstance(what, int) else font(21).getlength(what) + 18
        if x + w > width:
            x, y = 0, y + size + 10
        places.append((x, y, x + w, y + size))
        x += w + 5
    sheet = Image.new("RGB", (width, round(y + size + 1)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for (what, label), (x, y, right, bottom) in zip(chips, places):
        if isinstance(what, int):
            row, column = divmod(what, 8)
            patch = crop.crop((40 * column, 40 * row, 40 * column + 40, 40 * row + 40))
            sheet.paste(patch, (round(x), round(y)))
        else:
            learned = label not in (IGNORE, None)
            pen.rounded_rectangle((x, y, right, bottom), 8, RED if learned else PALE)
            pen.text(((x + right) / 2, y + size / 2), what, PAPER if learned else INK, font(21), "mm")
    return sheet


def draw_distribution(model, chat, side=480, margin=110):
    """Where a model in doubt may look: the distributions of x and of y, and their product over the photo."""
    text = "the middle of the green square"
    [found] = ask(model, chat, CROP, [("first mark", text)])
    bins = [p.reshape(50, 20).sum(1) for p in (found.x_distribution, found.y_distribution)]
    heat = np.outer(bins[1], bins[0])
    heat = Image.fromarray((255 * (heat / heat.max()) ** 0.5).astype(np.uint8)).resize((side, side))
    sheet = Image.new("RGB", (side + margin, side + margin + 40), PAPER)
    sheet.paste(Image.composite(Image.new("RGB", (side, side), RED), show(CROP, side), heat))
    pen, step = ImageDraw.Draw(sheet), side / 50
    for i in range(50):
        length = (margin - 10) * np.array([bins[0][i], bins[1][i]]) / max(map(max, bins))
        pen.rectangle((i * step, side + 4, i * step + step - 2, side + 4 + length[0]), RED)
        pen.rectangle((side + 4, i * step, side + 4 + length[1], i * step + step - 2), RED)
    pen.text((0, side + margin + 8), text, INK, font(22))
    return sheet


@torch.no_grad()
def draw_attention(model, chat, side=300):
    """How much the position that chooses the first digit of x attends to each patch, in each layer."""
    text = "the sharp end of the green horn"
    [question] = chat.encode_questions(Category("creature", [("first mark", text)]))
    maps = []

    def look(attention, args):
        x, cos, sin, *_ = args
        q, k = (layer(x).unflatten(-1, (-1, attention.d)).transpose(1, 2)  # (1, heads, T, d)
                for layer in (attention.q_proj, attention.k_proj))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = rotate(q, cos, sin)[:, :, -1:] @ rotate(k, cos, sin).transpose(2, 3) / attention.d ** 0.5
        maps.append(scores.softmax(-1)[0, :, 0, 1:65].mean(0).reshape(8, 8))  # of 64 patches, over heads

    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in model.llama.layers]
    tokens = torch.tensor([[chat.bos, *question, *chat.coordinates.known[0]]])
    words, image = model.llama.embed_tokens(tokens), model.see(normalize(CROP.cut(PHOTO, SIZE)[None]))
    model.llama(torch.cat((words[:, :1], image, words[:, 1:]), dim=1))
    for hook in hooks:
        hook.remove()
    sheet = Image.new("RGB", (len(maps) * (side + 20) - 20, side + 70), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, attended in enumerate(maps):
        heat = Image.fromarray((230 * (attended / attended.max()).numpy()).astype(np.uint8))
        heat = heat.resize((side, side), Image.Resampling.NEAREST)
        tile = Image.composite(Image.new("RGB", (side, side), RED), show(CROP, side), heat)
        sheet.paste(tile, (n * (side + 20), 0))
        share = f"layer {n + 1}: {attended.sum():.0%} of the attention"
        pen.text((n * (side + 20), side + 8), share, INK, font(20))
    pen.text((0, side + 38), f"{text}: where is x?", RED, font(20))
    return sheet


def main(argv):
    model, chat, _ = load_trained(TOY / "ckpt.pt", "cpu", TOY / "llm", TOY / "vit")
    FIGURES.mkdir(exist_ok=True)
    both = model, chat
    for name, draw, *args in (
            ("descriptions", draw_descriptions, *both), ("words", draw_words, *both), ("crop", draw_crop),
            ("sequence", draw_sequence, chat), ("distribution", draw_distribution, *both),
            ("attention", draw_attention, *both), ("portrait", draw_portrait)):
        draw(*args).quantize(256).save(FIGURES / f"{name}.png", optimize=True)  # a third of the bytes
        print(f"assets/figures/{name}.png")


if __name__ == "__main__":
    run(main)
