"""The words and sentence templates that `haystack` makes documents from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """Sentence templates about one subject; `{slot}` stands for a word of `WORDS`."""

    name: str
    templates: tuple[str, ...]


OPENINGS = (
    "In those years",
    "As a rule",
    "One spring,",
    "By most accounts",
    "After the long rains",
    "On quiet mornings",
    "Long before the railway came,",
    "Toward the end of the season",
    "When the wind turned north,",
    "According to the parish book,",
    "Every other week",
    "During the second winter",
    "Against all advice,",
    "To nobody's surprise,",
    "For as long as anyone remembered,",
    "Before the harvest",
)

# fmt: off
WORDS: dict[str, tuple[str, ...]] = {
    "person": (
        "Agnes", "Bertram", "Clara", "Dmitri", "Edith", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya", "Leopold",
        "Marta", "Nils", "Odile", "Piotr", "Quentin", "Rosa", "Stefan", "Tilda", "Ursula", "Viktor", "Wanda", "Yusuf",
    ),
    "other": (
        "the miller", "her cousin", "the ferryman", "an old sailor", "the schoolmaster", "a travelling tinker",
        "the widow next door", "his younger brother", "the notary", "a shepherd boy", "the baker's daughter",
        "the night watchman", "a retired captain", "the bell ringer", "two apprentices", "the harbour pilot",
    ),
    "village": (
        "Aldermoor", "Brackenford", "Corriedale", "Dunmarrow", "Elmscott", "Fernhollow", "Garrowby", "Hartsmere",
        "Islebrook", "Kestrel Bay", "Larkhill", "Mossgate", "Netherby", "Oxwell", "Pennywick", "Ravensea",
    ),
    "city": (
        "Lisbon", "Helsinki", "Nairobi", "Kyoto", "Montreal", "Santiago", "Prague", "Hanoi", "Cairo", "Dublin",
        "Oslo", "Lima", "Vienna", "Tunis", "Seville", "Riga", "Havana", "Bergen", "Krakow", "Athens",
    ),
    "weather": (
        "a cold drizzle", "thick fog", "a bright frost", "the first snow", "a dry east wind", "warm rain",
        "a sudden hailstorm", "low grey cloud", "a week of sunshine", "distant thunder", "sea mist", "heavy dew",
    ),
    "time": (
        "before dawn", "at noon", "late in the evening", "on market day", "after supper", "at low tide",
        "in the last week of autumn", "on the shortest day of the year", "an hour after sunrise", "past midnight",
        "between two trains", "on the feast of the patron saint",
    ),
    "craft": (
        "bookbinding", "weaving", "clock repair", "boat building", "glass blowing", "basket making", "letter carving",
        "bee keeping", "cheese making", "rope making", "printing", "carpentry", "dyeing wool", "grafting apple trees",
    ),
    "tool": (
        "a dented kettle", "the long ladder", "a pair of brass scales", "an iron hook", "a roll of tarred string",
        "the smallest chisel", "a borrowed lantern", "an oak mallet", "a leather satchel", "the copper funnel",
        "a folding ruler", "two wooden buckets", "a whetstone", "the spare rudder",
    ),
    "food": (
        "rye bread", "pickled herring", "a pot of lentils", "plum jam", "smoked cheese", "onion soup",
        "roasted chestnuts", "barley porridge", "a seed cake", "salted butter", "stewed pears", "cabbage rolls",
        "walnut biscuits",
    ),
    "plant": (
        "sorrel", "wild thyme", "a row of beans", "climbing roses", "foxgloves", "winter leeks", "two quince trees",
        "marigolds", "a bed of mint", "tall hollyhocks", "gooseberries", "a stand of willows", "blue flax",
    ),
    "animal": (
        "a grey heron", "the blind donkey", "three geese", "a lame fox", "the ferry cat", "a pair of swallows",
        "an otter", "the neighbour's goat", "a barn owl", "some stray ponies", "a tame jackdaw", "the old sheepdog",
    ),
    "place": (
        "behind the chapel", "by the lower bridge", "under the market arcade", "near the quarry", "along the tow path",
        "at the edge of the marsh", "above the mill race", "in the disused granary", "beside the toll house",
        "on the sheltered side of the hill", "opposite the post office", "beyond the orchard wall",
    ),
    "feeling": (
        "quiet pride", "mild suspicion", "real delight", "great patience", "some embarrassment", "stubborn hope",
        "open relief", "a touch of envy", "careful politeness", "simple curiosity", "unusual cheer", "dry humour",
    ),
    "object": (
        "a letter without a stamp", "an unfinished map", "a crate of oranges", "the second key", "a blue enamel jug",
        "a photograph of the regatta", "a bundle of receipts", "somebody's umbrella", "a broken music box",
        "the minutes of the last meeting", "a jar of buttons", "an almanac", "a hand-drawn chart of the shoals",
    ),
    "count": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "a dozen", "some twenty"),
    "colour": ("red", "pale green", "ochre", "dark blue", "white", "slate grey", "yellow", "brown", "violet", "copper"),
}
# fmt: on

SCENES: tuple[Scene, ...] = (
    Scene(
        "workshop",
        (
            "{person} kept the workshop {place} open even when {weather} emptied the streets of {village}.",
            "The bench was covered with {tool}, {object} and the remains of {food}.",
            "Nobody in {village} could explain why {craft} paid better than fishing, but for a while it did.",
            "Customers waited {count} days for an answer and accepted it with {feeling}.",
            "An apprentice learned {craft} by watching, and only later by being told.",
            "The shutters had been painted {colour} so often that they no longer closed.",
            "{person} lent {tool} to {other}, who returned it {time} with an apology.",
            "What was sold as new was often older than {other}, and better made.",
            "A good week meant {count} finished pieces and one that had to be done again.",
        ),
    ),
    Scene(
        "harbour",
        (
            "The boats of {village} came in {time}, with {weather} close behind them.",
            "{person} counted {count} sails beyond the shoals and wrote the number on the wall in {colour} chalk.",
            "A cargo of {food} was unloaded {place} and watched over by {animal}.",
            "The harbour master trusted {other} more than any instrument.",
            "Somebody had left {object} on the quay, and it stayed there until {weather} carried it off.",
            "Pilots from {city} were respected here, although they complained about the {food}.",
            "{count} ropes were replaced that month, and {tool} went overboard.",
            "On calm days you could hear {other} singing {place}.",
            "{person} held that {craft} and seamanship were the same art with different weather.",
        ),
    ),
    Scene(
        "garden",
        (
            "{person} planted {plant} {place}, where nothing else had ever grown.",
            "The soil of {village} is heavy, and {weather} makes it heavier.",
            "{animal} slept among the {colour} flowers and did no harm.",
            "Seeds were exchanged with a collector in {city}, wrapped in pages of an almanac.",
            "Of {count} cuttings, only one took, and it was tended with {feeling}.",
            "{other} advised against pruning {time}, and was right.",
            "Where there had been {plant}, the next owner put down gravel.",
            "In a good year the wall was warm enough to dry {food} on it.",
            "A gate of {colour} iron led from the garden to nowhere in particular.",
        ),
    ),
    Scene(
        "journey",
        (
            "{person} set out for {city} {time}, carrying {object} and {food}.",
            "The coach stopped {place} because of {weather}, and the passengers told stories.",
            "{other} had made the same journey {count} times and remembered every inn.",
            "At the border they were asked about {tool}, which was hard to explain.",
            "Letters from {city} took {count} weeks and arrived smelling of smoke.",
            "The road above {village} was lined with {plant} and badly drained.",
            "They shared {food} with {other} and parted with {feeling}.",
            "{animal} followed the coach as far as the {colour} milestone.",
            "No map agreed with the next about the distance between {village} and {city}.",
        ),
    ),
    Scene(
        "school",
        (
            "The school of {village} had {count} benches and one good window.",
            "{person} taught arithmetic in the morning and {craft} in the afternoon.",
            "Children brought {object} from home and had to describe it without naming it.",
            "When {weather} kept the teacher away, {other} read aloud instead.",
            "The {colour} map on the wall showed a country that had since changed its name.",
            "Prizes were given for {craft}, for patience, and once for finding {animal}.",
            "An inspector from {city} listened with {feeling} and ate all the {food}.",
            "{count} pupils went on to study elsewhere, and most of them came back.",
            "The bell was rung {time} by whoever was nearest.",
        ),
    ),
    Scene(
        "market",
        (
            "The market {place} sold {food}, {tool} and gossip, in that order.",
            "{person} bought {object} for {count} coins and never said why.",
            "Traders from {city} spread their {colour} cloths and called out the prices.",
            "A basket of {food} was exchanged for an afternoon of {craft}.",
            "{other} weighed everything twice, with {feeling}.",
            "{animal} got under the stalls and was blamed for {count} missing loaves.",
            "It rained, and the stalls of {village} stood in {weather} like moored ships.",
            "Whoever came {time} found only {plant} left.",
            "The oldest stall had passed from {other} to {person} without a written word.",
        ),
    ),
    Scene(
        "archive",
        (
            "The archive of {village} fills {count} shelves and smells of {food}.",
            "{person} found {object} between two ledgers, folded {count} times.",
            "Most entries concern {craft}, disputes over {plant}, and the price of lamp oil.",
            "A clerk with {colour} ink had corrected the names of half the families.",
            "The flood is mentioned once, the quarrel with {city} on every page.",
            "{other} had signed with a drawing of {animal}.",
            "Copies were sent to {city}, where they were received with {feeling}.",
            "Nothing was recorded for the year of {weather}, except one wedding.",
            "The key hung {place}, as everybody knew.",
        ),
    ),
    Scene(
        "weather",
        (
            "{weather} came over {village} {time} and stayed for {count} days.",
            "The river rose to the {colour} mark that {person} had painted {place}.",
            "{other} moved {animal} to higher ground without being asked.",
            "It was the kind of year in which {plant} flowered twice.",
            "The roof of the granary lost {count} tiles, and {tool} was found in the next field.",
            "People ate {food} by candlelight and talked about {city}.",
            "After {weather}, the air was so clear that the hills looked borrowed.",
            "{person} measured the rain in a jam jar and reported it with {feeling}.",
            "The forecast from {city} described another country altogether.",
        ),
    ),
    Scene(
        "music",
        (
            "The band of {village} rehearsed {place}, {count} players and {animal}.",
            "{person} had learned the fiddle in {city} and {craft} from necessity.",
            "The second song was slower than the first and was heard with {feeling}.",
            "Between dances there was {food}, and {other} told the story of the {colour} boat.",
            "A drum was mended with {tool} and sounded better for it.",
            "They played {time}, in {weather}, because they had promised.",
            "The tune had {count} verses, all of them about {plant}.",
            "{other} kept time with a spoon.",
            "Somebody exchanged {object} for a place in the front row.",
        ),
    ),
    Scene(
        "household",
        (
            "{person} rented {count} rooms {place}, with a view of {plant}.",
            "The kitchen was {colour}, low and warm, and there was always {food}.",
            "{other} came by {time} to return {object} and stayed for supper.",
            "A shelf held {tool}, an old radio and {count} cups without handles.",
            "The stairs creaked in {weather}, which {person} found reassuring.",
            "Visitors from {city} were given the good blankets and {food}.",
            "{animal} had its own chair and defended it with {feeling}.",
            "What could not be repaired by {craft} was kept in the attic.",
            "The house was sold {count} years later to {other}.",
        ),
    ),
)
