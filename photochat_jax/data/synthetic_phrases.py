"""What people say in the synthetic photo dialogues.

Voices: 'sharer' owns the scene that is talked about, 'partner' does not.
`{where}` is the position with its preposition. No template holds a word that is
a value of an attribute, so that a scene's words stand in the talk exactly as
often as the generator puts them there.
"""

# fmt: off
GREETINGS = (
  "hi", "hello", "hey there", "hello, how are you?", "hi, how is it going?",
  "good morning", "hey, what is up?", "good evening to you", "hello my friend",
)
GREETING_REPLIES = (
  "hi", "hello to you", "i am fine", "hey, all good here", "good, and you?",
  "hi, nice to hear you", "not bad, thanks", "i am doing well",
  "very well, thanks",
)
SMALL_TALK = (
  "i am at home today", "it was a long day", "i just had some coffee",
  "my sister says hello", "we had so much fun", "the weekend was great",
  "i am a little tired", "work was busy today", "i love days like this",
  "that sounds fun", "tell me more", "oh really?", "that is cool",
)
CLOSINGS = (
  "ok, talk to you later", "bye for now", "see you soon", "have a good day",
  "i have to go now", "thanks, bye", "good night then", "till next time",
)

# Groups of attributes that one sentence can tell -> voice -> templates.
MENTIONS = {
  ("shape",): {
    "sharer": (
      "i have a {shape}", "i got myself a {shape}", "my {shape} is ready",
      "i made a {shape} today", "it is a {shape}", "we found a {shape}",
      "guess what, a {shape}", "you know my {shape}",
    ),
    "partner": (
      "do you still have that {shape}?", "i heard about your {shape}",
      "tell me about your {shape}", "so you bought a {shape}",
      "how is your {shape}?", "they say it is a {shape}",
      "is it the {shape}?", "i like your {shape}",
    ),
  },
  ("colour",): {
    "sharer": (
      "it is {colour}", "it is all {colour}", "the colour is {colour}",
      "i painted it {colour}", "mine is {colour} now", "it looks so {colour}",
      "we made it {colour}", "this time it is {colour}",
    ),
    "partner": (
      "they say it is {colour}", "is it the {colour} one?",
      "i bet it is {colour}", "so it is {colour}, i hear",
      "you wanted a {colour} one", "i heard it is {colour}",
      "yours is {colour}, i think", "it must be {colour}",
    ),
  },
  ("size",): {
    "sharer": (
      "it is {size}", "it is rather {size}", "mine is really {size}",
      "it is so {size}", "it turned out {size}", "we got a {size} one",
      "it looks {size} to me", "this one is {size}",
    ),
    "partner": (
      "is it the {size} one?", "i bet it is {size}", "so it is {size}, i hear",
      "you wanted a {size} one", "they say it is {size}", "it must be {size}",
      "i heard it is {size}", "a {size} one, you said",
    ),
  },
  ("position",): {
    "sharer": (
      "it is {where}", "it stands {where}", "you find it {where}",
      "i put it {where}", "now it is {where}", "we have it {where}",
      "i keep it {where}", "it looks best {where}",
    ),
    "partner": (
      "is it {where}?", "so it stands {where}", "you put it {where}",
      "they say it is {where}", "i bet it is {where}", "it must be {where}",
      "you keep it {where}, i hear", "it was {where}, i think",
    ),
  },
  ("ground",): {
    "sharer": (
      "it is on {ground}", "it stands on {ground}", "i put it on {ground}",
      "there is {ground} under it", "we went out to the {ground}",
      "it rests on {ground}", "all around is {ground}", "it sits on {ground}",
    ),
    "partner": (
      "is it on {ground}?", "so there is {ground} under it",
      "they say it is on {ground}", "i bet it stands on {ground}",
      "you put it on {ground}", "it must be on {ground}",
      "i heard there is {ground}", "you love {ground}, i know",
    ),
  },
  ("size", "shape"): {
    "sharer": (
      "i have a {size} {shape}", "there is a {size} {shape} here",
      "we bought a {size} {shape}", "my {size} {shape} is ready",
    ),
    "partner": (
      "do you still have that {size} {shape}?",
      "i heard about your {size} {shape}", "so you made a {size} {shape}",
    ),
  },
  ("colour", "shape"): {
    "sharer": (
      "i have a {colour} {shape}", "there is a {colour} {shape} here",
      "we bought a {colour} {shape}", "i painted my {shape} {colour}",
    ),
    "partner": (
      "do you still have that {colour} {shape}?",
      "i heard about your {colour} {shape}", "so your {shape} is {colour}",
    ),
  },
  ("size", "colour"): {
    "sharer": (
      "it is {size} and {colour}", "i took the {size} {colour} one",
      "a {colour} one, and so {size}", "mine is {colour} and {size}",
    ),
    "partner": (
      "is it the {size} {colour} one?", "they say it is {colour} and {size}",
      "you wanted a {size} {colour} one",
    ),
  },
  ("size", "colour", "shape"): {
    "sharer": (
      "i have a {size} {colour} {shape}", "we found a {size} {colour} {shape}",
      "my {shape} is {size} and {colour}", "look, a {size} {colour} {shape}",
    ),
    "partner": (
      "do you still have that {size} {colour} {shape}?",
      "so your {shape} is {colour} and {size}",
      "i heard about the {size} {colour} {shape}",
    ),
  },
  ("position", "ground"): {
    "sharer": (
      "it is {where}, on {ground}", "i put it on {ground}, {where}",
      "it stands {where} on {ground}", "there is {ground}, and it is {where}",
    ),
    "partner": (
      "is it {where}, on {ground}?", "so it stands on {ground}, {where}",
      "they say it is {where} on {ground}",
    ),
  },
  ("shape", "ground"): {
    "sharer": (
      "my {shape} is on {ground}", "the {shape} stands on {ground}",
      "there is a {shape} on {ground}", "i put the {shape} on {ground}",
    ),
    "partner": (
      "is your {shape} on {ground}?", "so the {shape} stands on {ground}",
      "i heard of a {shape} on {ground}",
    ),
  },
  ("shape", "position"): {
    "sharer": (
      "my {shape} is {where}", "the {shape} stands {where}",
      "i put the {shape} {where}", "there is a {shape} {where}",
    ),
    "partner": (
      "is your {shape} {where}?", "so the {shape} stands {where}",
      "i heard of a {shape} {where}",
    ),
  },
}
# Ways to tell all five attributes; the order of the groups is random.
PARTITIONS = (
  (("size", "colour", "shape"), ("position", "ground")),
  (("size", "shape"), ("colour",), ("position", "ground")),
  (("colour", "shape"), ("size",), ("position", "ground")),
  (("size", "colour"), ("shape", "ground"), ("position",)),
  (("size", "colour"), ("shape", "position"), ("ground",)),
  (("shape",), ("size", "colour"), ("position", "ground")),
  (("size", "colour", "shape"), ("position",), ("ground",)),
  (("shape",), ("colour",), ("size",), ("position", "ground")),
  (("size", "shape"), ("colour",), ("position",), ("ground",)),
  (("colour", "shape"), ("size",), ("position",), ("ground",)),
  (("shape",), ("colour",), ("size",), ("position",), ("ground",)),
)

REQUESTS = (
  "can you show me?", "please send a photo", "i want to see it",
  "do you have a picture?", "show me please", "may i see it?",
  "let me see it", "could you send me a picture?", "i would love to see it",
)
OFFERS = (
  "do you want to see it?", "shall i show you?", "want to see a photo?",
  "i can send you a picture", "would you like to see it?",
  "i took a photo, want it?", "should i send a photo?",
  "i have a picture for you",
)
OFFER_ACCEPTED = (
  "yes please", "sure, show me", "oh yes", "of course i do", "yes, send it",
  "go ahead", "yes, let me see", "please do",
)
OFFER_REFUSED = (
  "no thanks, not now", "maybe later", "not today, sorry", "no, i believe you",
  "not now, i am busy", "no need, thanks", "another time maybe",
  "no, my phone is dead",
)
ANNOUNCEMENTS = (
  "sure, here you go", "here it is", "ok, one moment", "look", "of course",
  "there you go", "yes, this is it", "ok, sending it now",
)
NO_CAMERA = (
  "i have no camera with me", "my camera is broken", "i lost my camera",
  "my phone takes no pictures", "no camera here today",
  "i can not take photos now", "my camera is at work",
  "the camera does not work",
)
DECLINES = (
  "sorry, i can not", "no, as i said", "sorry, no camera", "not possible now",
  "i wish i could", "maybe next week", "i really can not", "no way to do that",
)
PARTNER_ASKED = (
  "any photo from your side?", "did you take a picture today?",
  "show me yours first", "and you, any pictures?", "what did you see today?",
  "do you have one to show?", "send me a photo of yours",
  "let me see yours",
)
PARTNER_SHOWS = (
  "look what i found", "here is my photo", "i took this today",
  "see my picture first", "this one is mine", "look at this",
  "i have a photo for you", "let me show you mine",
)
REACTIONS = (
  "wow", "so nice!", "that looks great", "i love it", "very cool",
  "oh that is nice", "what a picture", "great photo", "looks good to me",
)
AFTERTHOUGHTS = (
  "i took it this morning", "my brother helped me", "it is my favorite",
  "what do you think?", "do you like it?", "i am proud of it",
  "it took me all day", "my mom loves it",
)

# attribute -> who asks ("owner" of the photo, "other") -> templates.
QUESTIONS = {
  "wall": {
    "owner": (
      "what colour is the wall in my photo?",
      "can you see my wall? which colour is it?",
      "which colour is my wall?", "what colour is my wall?",
      "do you see the wall? what colour?", "guess the colour of my wall",
      "tell me the colour of the wall", "which colour has my wall?",
    ),
    "other": (
      "what colour is the wall?", "which colour is your wall?",
      "what colour is that wall?", "and the wall, which colour is it?",
      "is that wall painted? what colour?", "which colour is the wall there?",
      "what is the colour of the wall?", "tell me the colour of your wall",
    ),
  },
  "shape": {
    "owner": ("what is in my photo?", "what thing do you see?"),
    "other": ("what is in the photo?", "what thing is that?"),
  },
  "colour": {
    "owner": ("which colour is my thing?", "what colour is the thing?"),
    "other": ("which colour is your thing?", "what colour is the thing?"),
  },
  "size": {
    "owner": ("what size is my thing?", "how large does it look?"),
    "other": ("what size is the thing?", "how large is it?"),
  },
  "ground": {
    "owner": ("what is under it in my photo?", "what does it stand on?"),
    "other": ("what is under it?", "what does it stand on?"),
  },
  "position": {
    "owner": ("where is it in my photo?", "where do you see it?"),
    "other": ("where in the photo is it?", "where does it stand?"),
  },
}
ANSWERS = {
  "wall": (
    "the wall is {wall}", "it is {wall}", "that wall is {wall}",
    "it looks {wall}", "it is a {wall} wall", "{wall}, i think",
    "the colour is {wall}", "the wall looks {wall}", "clearly {wall}",
  ),
  "shape": ("it is a {shape}", "a {shape}", "that is a {shape}"),
  "colour": ("it is {colour}", "the thing is {colour}", "a {colour} one"),
  "size": ("it is {size}", "a {size} one", "it looks {size}"),
  "ground": ("it is on {ground}", "that is {ground}", "it stands on {ground}"),
  "position": ("it is {where}", "it stands {where}", "{where}"),
}
