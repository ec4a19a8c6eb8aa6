"""A conversation: text and photos in, text and photos out.

`Conversation` keeps the turns and is what a terminal, a test or a server talks
to; `chat` is the terminal. The model is user 0 of PhotoChat's schema, the one
who shares photos, and the human is user 1.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Sequence

from etils import epath
from PIL import Image

from photochat_jax import captioners, generate
from photochat_jax import config as config_lib
from photochat_jax.data import dialogue, images, schema
from photochat_jax.data.spec import LeftOut
from photochat_jax.decoding_options import GREEDY, Options

MODEL, USER = 0, 1

Describe = Callable[[schema.Photo], str]
"""A photo -> what it shows."""

# The model may go on after its photo, but not share for ever.
MAX_PHOTOS_PER_TURN = 4

HELP = """Type, and the model answers.
  /photo FILE      share a photo
  /save FILE.json  save the conversation, its photos beside it
  /help            this
  /quit            end (so do Ctrl-C and Ctrl-D)"""


class ChatError(ValueError):
  """Something the user can put right; the message is one sentence."""


class Conversation:
  """What has been said, and a model to go on with.

  Attributes:
    turns: oldest first; a photo has a turn of its own.
    folder: where the model's photos are written, as NNNN.png.
  """

  def __init__(
    self,
    generator: generate.Generator,
    folder: epath.PathLike,
    seed: int = 0,
    options: Options = GREEDY,
    turns: Sequence[schema.Turn] = (),
    describe: Describe | None = None,
  ):
    """Begins, or goes on after `turns`.

    Args:
      generator: the model.
      folder: for its photos; made when there is one.
      seed: of drawing, and of sampling. The same conversation with the same
        seed has the same answers.
      options: how words are decoded, but for the seed.
      turns: what has been said.
      describe: says what a photo shows, for a model that sees none.
    """
    self.turns = list(turns)
    self.folder = epath.Path(folder)
    self._generator = generator
    self._seed = seed
    self._options = options
    self._describe = describe

  def add_user(self, text: str) -> schema.Turn:
    """The user says something; a message of blanks is a ChatError."""
    if not text.strip():
      raise ChatError("The message is empty; type something.")
    return self._add(USER, text.strip())

  def add_user_photo(self, path: epath.PathLike) -> schema.Turn:
    """The user shares a photo.

    Raises:
      images.ImageError: it cannot be read; nothing was added.
    """
    name = f"user/{len(self.turns):04d}"
    photo = schema.Photo(name, "", None, epath.Path(path))
    self._generator.see(photo)
    if self._describe:
      photo = dataclasses.replace(photo, seen=self._describe(photo))
    return self._add(USER, "", photo)

  def reply(self) -> tuple[schema.Turn, ...]:
    """The model's turn: its text and photos in order, () if it is silent.

    After its own photo it sees the photo, as in training, before it goes on.
    Of a conversation longer than the model's context the newest turns count.
    """
    generator, first = self._generator, len(self.turns)
    for _ in range(MAX_PHOTOS_PER_TURN):
      options = dataclasses.replace(
        self._options, seed=self._seed + len(self.turns)
      )
      (answer,) = generator.respond(
        [
          dialogue.encode_context(
            self.turns, MODEL, generator.tokenizer, generator.spec
          )
        ],
        options=options,
      )
      if answer.text:
        self._add(MODEL, answer.text)
      if not answer.caption:
        break
      self._add(MODEL, "", self._draw(answer.caption))
    return tuple(self.turns[first:])

  def _add(self, speaker, text, photo=None):
    self.turns.append(schema.Turn(speaker, text, photo))
    return self.turns[-1]

  def _draw(self, caption: str) -> schema.Photo:
    pixels = self._generator.draw([caption], [self._seed + len(self.turns)])
    self.folder.mkdir(parents=True, exist_ok=True)
    taken = [int(p.stem) for p in self.folder.glob("*.png") if p.stem.isdigit()]
    path = self.folder / f"{max(taken, default=0) + 1:04d}.png"
    with path.open("wb") as file:
      Image.fromarray(pixels[0]).save(file, "PNG")
    return schema.Photo(f"chat/{path.stem}", "", caption, path)

  def save(self, path: epath.PathLike) -> epath.Path:
    """Writes the conversation as a list of one PhotoChat record.

    Photos go beside the file, to `photos/NAME/NNNN.jpg`, named by the file's
    own NAME; for a file in a folder `train`, `dev` or `test` they go beside
    that folder, which makes a data set in PhotoChat's layout.

    Returns:
      The file's path.

    Raises:
      ChatError: it cannot be written there.
    """
    path = epath.Path(path).expanduser()
    name = re.sub(r"[^\w-]", "_", path.stem)
    turns, own = [], {"photo_id": "", "photo_description": ""}
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      for number, turn in enumerate(self.turns):
        record = {
          "message": turn.text,
          "share_photo": turn.photo is not None,
          "user_id": turn.speaker,
        }
        if turn.photo:
          photo_id = f"{name}/{number:04d}"
          _copy_photo(turn.photo, _photo_file(path, photo_id))
          shared = {
            "photo_id": photo_id,
            "photo_description": turn.photo.description,
          }
          record |= shared
          if turn.photo.caption:
            record["photo_caption"] = turn.photo.caption
          if turn.speaker == MODEL:
            own = shared
        turns.append(record)
      record = {"dialogue": turns, "dialogue_id": name, "photo_url": "", **own}
      path.write_text(json.dumps([record], indent=1, ensure_ascii=False))
    except OSError as error:
      raise ChatError(f"{path} cannot be written: {error}.") from error
    return path

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    generator: generate.Generator,
    folder: epath.PathLike,
    **options,
  ) -> "Conversation":
    """Goes on with a conversation that `save` wrote.

    Args:
      path: the file.
      generator: the model.
      folder: for the photos to come.
      **options: `seed` and `temperature`.

    Raises:
      ChatError: it is not such a file.
    """
    path = epath.Path(path).expanduser()
    try:
      (record,) = json.loads(path.read_text())
      turns = [_read_turn(turn, path) for turn in record["dialogue"]]
    except OSError as error:
      raise ChatError(f"{path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
      raise ChatError(
        f"{path} is not a conversation; give a file that /save wrote."
      ) from error
    return cls(generator, folder, turns=turns, **options)


def _photo_file(path: epath.Path, photo_id: str) -> epath.Path:
  """Where the photo of a saved conversation lies."""
  folder = path.parent
  if folder.name in schema.SPLITS:
    folder = folder.parent
  return folder / "photos" / f"{photo_id}.jpg"


def _copy_photo(photo: schema.Photo, target: epath.Path) -> None:
  """Writes a photo as JPEG of its own size, without what a camera noted."""
  image = images.decode(photo.path.read_bytes(), str(photo.path))
  target.parent.mkdir(parents=True, exist_ok=True)
  with target.open("wb") as file:
    image.save(file, "JPEG", quality=95, subsampling=0)


def _read_turn(record: dict, path: epath.Path) -> schema.Turn:
  photo = None
  if record["share_photo"]:
    file = _photo_file(path, record["photo_id"])
    photo = schema.Photo(
      record["photo_id"],
      record["photo_description"],
      record.get("photo_caption"),
      file if file.exists() else None,
    )
  return schema.Turn(record["user_id"], record["message"], photo)


def talk(
  conversation: Conversation,
  read: Callable[[str], str] = input,
  write: Callable[[str], None] = print,
) -> None:
  """Reads lines and answers until /quit, Ctrl-D or Ctrl-C.

  Args:
    conversation: to go on with.
    read: prompt -> the user's line; raises EOFError at the end.
    write: shows a line.
  """
  try:
    while True:
      line = read("you> ").strip()
      command, _, argument = line.partition(" ")
      # A path may be quoted, as terminals do with what is dropped on them.
      argument = argument.strip().strip("'\"")
      if command == "/quit":
        break
      try:
        if not line:
          continue
        if command == "/help":
          write(HELP)
        elif command == "/save":
          if not argument:
            raise ChatError("Give a file: /save FILE.json")
          write(f"saved {conversation.save(argument)}")
        elif command == "/photo":
          if not argument:
            raise ChatError("Give a file: /photo FILE")
          conversation.add_user_photo(epath.Path(argument).expanduser())
          _answer(conversation, write)
        elif command.startswith("/"):
          raise ChatError(f"There is no command {command}; type /help.")
        else:
          conversation.add_user(line)
          _answer(conversation, write)
      except (ChatError, images.ImageError, LeftOut) as error:
        write(str(error))
  except (EOFError, KeyboardInterrupt):
    write("")
  write("Bye.")


def _answer(conversation: Conversation, write: Callable[[str], None]) -> None:
  said = conversation.reply()
  for turn in said:
    text = turn.text
    if turn.photo:
      text = f"[{turn.photo.path}: {turn.photo.caption}]"
    # A model can write any byte, those that steer a terminal too.
    shown = "".join(c if c.isprintable() else " " for c in text)
    write(f"model> {shown}")
  if not said:
    write("model> ...")


def chat(
  run: config_lib.RunConfig,
  workdir: epath.PathLike,
  read: Callable[[str], str] = input,
  write: Callable[[str], None] = print,
) -> None:
  """A conversation in the terminal with the newest checkpoint.

  Args:
    run: the run's settings.
    workdir: its folder; photos are drawn into its `chat/`.
    read: see `talk`.
    write: see `talk`.

  Raises:
    CheckpointError: there is no checkpoint, or it is of another config.
  """
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  Arrow keys and history for `input`.
  generator, step = generate.open_generator(run, workdir, batch_size=1)
  describe = None
  if run.model.perceiver == "caption":
    describe = _open_captioner(run)
  write(f"The model of step {step} is listening.\n{HELP}")
  conversation = Conversation(
    generator,
    epath.Path(workdir) / "chat",
    run.seed,
    Options.of(run.eval, run.seed),
    describe=describe,
  )
  talk(conversation, read, write)


def _open_captioner(run: config_lib.RunConfig) -> Describe:
  """Who reads photos to a model that sees none.

  Raises:
    ConfigError: the run names no captioner, or it cannot be opened.
  """
  if not run.pretrained.captioner:
    raise config_lib.ConfigError(
      "A model of perceiver='caption' reads what a captioner writes; name a "
      "run that captions, --config.pretrained.captioner=RUN."
    )
  captioner, _ = captioners.open_own(
    run.pretrained.captioner, Options(), batch_size=1
  )

  def describe(photo: schema.Photo) -> str:
    image = captioner.prepare(images.decode(photo.path.read_bytes()))
    (written,) = captioner.write([photo.id], [image])
    return written.text

  return describe
