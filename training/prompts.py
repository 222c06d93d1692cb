"""Prompts of the evaluation, in addition to the names of concepts."""

# Things that may have any colour and are mostly of one colour, with their concepts.
COLOURED = {
    "apple": "red apple",
    "backpack": "backpack",
    "balloon": "balloon",
    "bell": "bell",
    "bird": "bird",
    "book": "closed book",
    "butterfly": "butterfly",
    "car": "automobile",
    "chair": "chair",
    "dress": "dress",
    "fish": "fish",
    "flower": "tulip",
    "guitar": "guitar",
    "heart": "red heart",
    "house": "house",
    "key": "key",
    "mushroom": "mushroom",
    "shirt": "t-shirt",
    "turtle": "turtle",
    "umbrella": "umbrella",
}

# Things that mostly have one colour.
USUAL_COLOURS = {
    "apple": "red",
    "balloon": "red",
    "dolphin": "blue",
    "strawberry": "red",
    "frog": "green",
    "banana": "yellow",
    "grapes": "purple",
    "carrot": "orange",
    "pig": "pink",
    "cactus": "green",
    "heart": "red",
    "fish": "blue",
}

_DOGS = ("dog", "dog face", "poodle", "guide dog", "service dog")
_CATS = ("cat", "cat face", "black cat")
_HORSES = ("horse", "horse face", "carousel horse", "horse racing")
_CARS = ("automobile", "oncoming automobile", "sport utility vehicle", "racing car", "taxi", "oncoming taxi")
_LAUGHING = (
    "face with tears of joy",
    "rolling on the floor laughing",
    "grinning face",
    "grinning squinting face",
    "grinning face with big eyes",
    "grinning face with smiling eyes",
    "grinning face with sweat",
    "beaming face with smiling eyes",
)
_CRYING = ("crying face", "loudly crying face", "sad but relieved face", "face holding back tears", "crying cat")
_ILL = (
    "face with thermometer",
    "nauseated face",
    "face with medical mask",
    "face vomiting",
    "sneezing face",
    "face with head-bandage",
    "hot face",
    "woozy face",
)

# Plain English without the name of a concept, and the concepts that are accepted.
OPEN = {
    "a doggo sleeping": _DOGS,
    "my pup": _DOGS,
    "a kitty on a table": _CATS,
    "someone laughing": _LAUGHING,
    "someone weeping": _CRYING,
    "someone ill": _ILL,
    "a hare in the garden": ("rabbit", "rabbit face"),
    "a pony": _HORSES,
    "a stallion running": _HORSES,
    "a piglet": ("pig", "pig face", "boar", "pig nose"),
    "a serpent": ("snake",),
    "a moth": ("butterfly", "mosquito", "fly", "bug"),
    "a motorcar driving by": _CARS,
    "an airliner in the sky": ("airplane", "small airplane", "airplane departure", "airplane arrival"),
    "a pushbike": ("bicycle", "person biking", "man biking", "woman biking", "person mountain biking"),
    "a spacecraft": ("rocket", "flying saucer", "satellite"),
    "an extraterrestrial": ("alien", "alien monster"),
    "a little cottage": ("house", "house with garden", "hut", "houses", "derelict house"),
    "a skyscraper": ("office building", "cityscape", "hotel", "department store", "tokyo tower"),
    "a burger": ("hamburger",),
    "an espresso": ("hot beverage", "teacup without handle"),
    "a gateau": ("birthday cake", "shortcake", "cupcake", "pie", "moon cake"),
    "a spud": ("potato", "roasted sweet potato"),
    "a prawn": ("shrimp", "fried shrimp", "lobster"),
    "a lager": ("beer mug", "clinking beer mugs"),
    "some vino": ("wine glass", "clinking glasses"),
    "a fiddle": ("violin",),
    "a telly": ("television",),
    "my specs": ("glasses", "sunglasses", "goggles"),
    "a brolly": ("umbrella", "closed umbrella", "umbrella with rain drops", "umbrella on ground"),
    "a smartphone": ("mobile phone", "mobile phone with arrow"),
    "a campfire": ("fire", "camping"),
    "trainers": ("running shoe", "man's shoe", "hiking boot"),
    "a jewel": ("gem stone", "ring"),
}
