"""The instructions that the paper compares with its own, ask_with_description() (Tables 3, 6, 7 and 9).

An instruction turns a scene into a list of (question, answer). An answer is a point (x, y), None in a test,
or a word.
"""

from chat import ask_with_description, write_point
from common import InputError

WHAT = "User: what is in the photo?\nAssistant:"
OUTLINE = (
    "A conversation about a photo of one object. The user names a keypoint of the object and describes where "
    "it is. The assistant answers with its place, [x,y], as fractions of the photo's width and height.\n")
WORDINGS = [
    "where is the {}?", "can you show me the {}?", "at which point is the {}?", "please locate the {}.",
    "what is the position of the {}?", "find the {} in the photo.", "where do you see the {}?",
    "give the coordinates of the {}."]


def ask_as_the_authors(scene):
    """The wording of the question in the authors' code."""
    return [(f"User: Where is the {name} of this object in this image? Please provide its coordinates.\n"
             f"Reference: {description}\nAssistant:", point) for (name, description), point in scene.asked]


def ask_by_name(scene):
    """Without descriptions (Table 3)."""
    return [(f"User: where is the {name}?\nAssistant:", point) for (name, _), point in scene.asked]


def ask_after_list(scene):
    """The names of all the category's keypoints come first, once a conversation (Table 3)."""
    names = ", ".join(name for name, _ in scene.category.keypoints)
    return put_before(f"Keypoints: {names}\n", ask_with_description(scene))


def ask_diversely(scene):
    """Training draws one of many wordings for each question, a test uses the first (Table 6)."""
    def wording():
        return WORDINGS[scene.rng.integers(len(WORDINGS)) if scene.rng else 0]
    return [(f"User: {wording().format(name)}\nReference: {description}\nAssistant:", point)
            for (name, description), point in scene.asked]


def ask_after_outline(scene):
    """What the task is comes first, once a conversation (Table 6)."""
    return put_before(OUTLINE, ask_with_description(scene))


def ask_diversely_after_outline(scene):
    """Both (Table 6)."""
    return put_before(OUTLINE, ask_diversely(scene))


def ask_step_by_step(scene):
    """First what the object is, then where its keypoints are (Table 7, Figure 5).

    In a test the model's own answer to the first question stays in the conversation: see iccv.py.
    """
    return [(WHAT, spoken_name(scene.category)), *ask_with_description(scene)]


def pretrain_directly(scene):
    """The other way round: which keypoint is at this point? (Table 9, Figure 6)"""
    return [(f"User: which keypoint is at{write_point(point)}?\nAssistant:", name)
            for (name, _), point in scene.asked]


def pretrain_step_by_step(scene):
    """What the object is, whether it shows a keypoint, which of several is at a point (Table 9, Figure 7)."""
    conversation = [(WHAT, spoken_name(scene.category))]
    names = [name for (name, _), _ in scene.asked]
    for (name, _), point in scene.asked:
        is_absent = scene.invisible and scene.rng.random() < 0.5  # so that the answer is not always yes
        wanted = scene.rng.choice(scene.invisible) if is_absent else name
        shuffled = ", ".join(scene.rng.permutation(names))
        conversation += [(f"User: is the {wanted} to be seen?\nAssistant:", "no" if is_absent else "yes"),
                         (f"User: which of {shuffled} is at{write_point(point)}?\nAssistant:", name)]
    return conversation


INSTRUCTIONS = {"description": ask_with_description, "name": ask_by_name, "list": ask_after_list,
                "authors": ask_as_the_authors, "diverse": ask_diversely, "outline": ask_after_outline,
                "diverse-outline": ask_diversely_after_outline, "step": ask_step_by_step}
PRETRAINING = {"direct": pretrain_directly, "step": pretrain_step_by_step}


def find_instruction(instruction, pretrain=None):
    """The instruction of --instruction or --pretrain, by its name. InputError if there is none."""
    if pretrain and instruction != "description":
        raise InputError("--pretrain has an instruction of its own: leave out --instruction")
    named, name = (PRETRAINING, pretrain) if pretrain else (INSTRUCTIONS, instruction)
    if name not in named:
        raise InputError(f"{name}: no such instruction; there are {', '.join(named)}")
    return named[name]


def put_before(text, conversation):
    """The same conversation with a text before its first question."""
    (question, answer), *rest = conversation
    return [(text + question, answer), *rest]


def spoken_name(category):
    return category.name.replace("_", " ")
