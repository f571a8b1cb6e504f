"""Words of RULER's tasks: adjectives, nouns and verbs, and made-up words where a text needs more. Imports no torch."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from infini_train.data.synthetic.ruler.items import Shuffle

_ADJECTIVES = """
able abrupt absent aged alert amber ample ancient angry arctic arid ashen awake aware awkward bald bare basic bitter
blank bleak blind blunt bold brave brief bright brisk brittle broad bronze bulky busy calm candid careful casual
cautious cheap cheerful chilly civil clean clear clever cloudy clumsy coarse cold common complex compact cool copper
costly cosy crimson crisp crooked crowded cruel curious curly damp dark deaf dear decent deep dense diligent dim
direct distant dizzy double drowsy dry dull dusty eager early eastern easy elastic elegant empty equal exact exotic
faded faint fair faithful famous fancy fast fatal feeble fertile fierce final firm flat fluent fluffy foggy fond
foolish formal fragile frank free frequent fresh friendly frosty frozen full funny fuzzy generous gentle giant glad
gloomy glossy golden graceful grand grateful gray greasy green grumpy handy harsh hasty hazy heavy hidden hollow
honest hostile huge humble humid hungry icy ideal idle immense inner jolly keen kind lame large late lavish lazy lean
light linen liquid little lively local lonely long loose loud lovely loyal lucky lunar magic major mellow merry mighty
mild minor misty modern modest moist muddy mute narrow nasty naval neat nervous nimble noble noisy northern novel numb
odd olive open orderly outer oval pale patient peaceful plain playful pleasant plump polite poor precise pretty proud
prompt public pure purple quaint quick quiet rapid rare raw ready recent reckless remote restless rich rigid ripe
robust rotten rough round rowdy royal rude rural rusty sacred salty sandy scarce scarlet secret serene severe shabby
shallow sharp shiny short shrill shy silent silky silly simple sincere sleek sleepy slender slim slippery slow small
smart smooth snowy sober soft solar solemn solid sore sour southern spare sparse spicy stable stale steady steep stern
sticky stiff stormy strange strict strong stubborn sturdy subtle sudden sunny supple sweet swift tall tame tart tender
tense thick thin thirsty thorough tidy tight tiny tired tough tropical true urban useful vague valid vast velvet
violet vivid warm wary weak wealthy weary western wet wicked wide wild windy wise witty wooden woolen worthy yellow
young zealous
"""
_NOUNS = """
acorn actor airport alley almond anchor ankle apron arch arena armor arrow artist atlas attic author autumn avenue
badge bakery balcony balloon bamboo banana banner barber barn barrel basin basket battery beach beacon beaver bell
belt bench berry bicycle blanket blossom board boat bonnet border bottle boulder bracelet branch bread breeze brick
bridge brook broom brother bubble bucket buffalo bullet bundle bureau bush butter button cabbage cabin cable cactus
camel camera canal candle candy canoe canvas canyon captain caravan carbon cardigan cargo carpet carrot castle cattle
cavern cedar ceiling cellar cement chair chalk chamber channel chapel chapter cheese cherry chest chicken chimney
church cinema circle circus citizen clarinet clay cliff clinic clock closet cloth clover coach coast cobra coconut
coffee coin collar colony column comet compass concert copy coral corner cottage cotton couch cousin cradle crane
crater crayon cricket crown crystal cupboard current curtain cushion daisy dancer daughter debate degree denim dentist
desert desk diary dinner dish doctor dolphin donkey door dragon drawer dream dress drum eagle echo editor elbow
elephant elevator ember emperor engine envelope eraser evening fabric factory falcon farmer father feather fence ferry
festival fiddle field figure finger fire flag flame flour flower flute forest fork fossil fountain fox freezer friend
frog fruit funnel gallery garage garden garlic gate gazelle geyser ginger giraffe glacier glass globe glove goat
goblet gorilla grain granite grape gravel guitar hail hallway hammer hammock harbor harness harvest hat hawk hazel
helmet herald hermit hill hinge honey hood horizon horn horse hostel hotel hurdle hut igloo impulse indigo insect
island ivory jacket jar jasmine jelly jersey jewel jigsaw journal judge jungle jury kettle keyboard kidney kitchen
kite kitten knee knight ladder lagoon lake lamp lantern laptop lawn lawyer leaf leather legend lemon leopard letter
library lily linen lion lizard llama lobster locker lotus lounge lumber lynx machine magnet mango manor mantle maple
marble market mason meadow medal melody melon mentor mercury metal meteor mill mineral mirror mitten monkey monsoon
moose morning mosaic moss mother motor mountain mouse museum music mustard napkin needle nephew nest nickel notebook
novel nurse nutmeg oak oasis oatmeal ocean octopus office onion opera orange orbit orchard orchid organ ostrich otter
oven oyster paddle palace panda panther paper parade parcel parrot pasture path peach peanut pearl pebble pelican
pencil penguin pepper piano picnic pigeon pillow pilot pine pirate planet plaster plate platform plaza plum pocket
poem pond pony porch portrait postcard potato powder prairie prince prism puddle pumpkin puppet puzzle pyramid quarry
queen quilt rabbit raccoon radar radio railway rain ranch raven record reef ribbon rice ring river robin robot rocket
roof rope rose rubber ruby saddle sailor salad salmon satchel sauce scarf school scissor sculptor seal season shadow
shark shelf shell shelter sheriff shield ship shirt shovel shrimp silver singer sister sketch skirt sky sled slipper
smoke snail soap sock sofa soldier soup sparrow spider spoon spring squirrel stable stadium statue steam stone storm
stove straw stream street student sugar suitcase summer sunset surgeon swan sweater sword table tailor teacher teapot
temple tennis thimble thread throne thunder ticket tiger timber toast tomato torch tower tractor train treasure tree
trophy trumpet tulip tunnel turtle twig umbrella uncle valley vapor vase vault village vine vinegar violin volcano
wagon waiter wallet walnut water wave weasel whale wheat wheel whisper whistle widow willow window winter wizard wolf
wombat yacht yard yogurt zebra zipper
"""
_VERBS = """
absorb accept admire adopt advise allow amuse announce answer appear applaud argue arrange arrive ascend assist attend
avoid bathe become begin believe belong bend bless boil borrow bounce breathe bring broadcast build calculate carry
carve celebrate chase chew choose clap climb collect combine compare compose conceal confess connect consider contain
continue convince count crawl create cross decide deliver depart depend describe deserve destroy develop discover
divide donate earn embrace employ encourage enjoy enter escape examine expand expect explain explore fasten fetch fix
float follow forbid forget forgive gather glance glide grab greet grow guess happen hesitate hire hop hover hurry
imagine improve include inform inherit inspect invent invite join judge juggle jump kneel knit know laugh launch lean
learn lend listen locate manage melt mend mention multiply nod notice obey observe obtain occur offer overtake paint
pause peel perform persuade plant polish postpone pour practise praise predict prefer prepare pretend prevent promise
protect prove punish rejoice relax release remain remember remove repair repeat replace rescue return reveal ripen
roast scatter scrub search select separate shiver shout shrink sigh sing skip slide sneeze soar solve speak spill
sprint squeeze stare stretch stumble succeed suggest supply support surprise surround swallow sweep swim teach thank
throw tickle touch travel tremble trust unite unlock untie vanish visit wander weave welcome whisk wonder wrestle
write yawn yell
"""
ADJECTIVES, NOUNS, VERBS = (tuple(sorted(set(words.split()))) for words in (_ADJECTIVES, _NOUNS, _VERBS))
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
_SYLLABLES = tuple(f"{consonant}{vowel}" for consonant in "bcdfghjklmnpqrstvwyz" for vowel in "aeiou")  # 100
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


class Words(Protocol):
    """Different words in random order, known by their places."""

    size: int

    def __getitem__(self, places: np.ndarray) -> list[str]: ...


class RealWords:
    """All `WORDS` in an order that the seed determines; see `Words`."""

    size = len(WORDS)

    def __init__(self, seed: Sequence[int]) -> None:
        self._order = Shuffle(self.size, seed)

    def __getitem__(self, places: np.ndarray) -> list[str]:
        return [WORDS[number] for number in self._order[places]]


class MadeUpWords:
    """Words of syllables, for texts that need more than there are real ones; see `Words`.

    RULER, too, takes all words from a second, larger list where its first one is too short.

    Args:
        least: number of words that there must be.
        seed: determines their order.
    """

    def __init__(self, least: int, seed: Sequence[int]) -> None:
        self._syllables = 3
        while len(_SYLLABLES) ** self._syllables < least:
            self._syllables += 1
        self.size = len(_SYLLABLES) ** self._syllables
        self._order = Shuffle(self.size, seed)

    def __getitem__(self, places: np.ndarray) -> list[str]:
        return [self._spell(int(number)) for number in self._order[places]]

    def _spell(self, number: int) -> str:
        """The word of a number: its digits to base 100 as syllables."""
        return "".join(_SYLLABLES[number // len(_SYLLABLES) ** i % len(_SYLLABLES)] for i in range(self._syllables))


def draw_letters(random: np.random.Generator, count: int, letters: int) -> list[str]:
    """`count` different words of random small letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(_LETTERS, letters))] = None
    return list(found)
