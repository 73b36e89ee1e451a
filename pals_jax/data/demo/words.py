"""The words of the bundled tasks: data only; `lexicon` reads it.

One domain after another, each with who acts, where, and what can be done to what:

    verb = synonym > what it implies ! its opposite : objects

A synonym, implied verb or opposite must suit every object of its line. The last object of a line
is held out: with that verb it occurs in dev sentences only.
"""

DOMAINS = """
[kitchen]
people: chef, baker, waiter, butcher
places: in the kitchen, on the terrace, in the dining room, in the hotel
fry > cook: egg, fish, mushroom, potato, sausage, steak
bake > make: cake, pizza, tart, biscuit, pie
chop > cut: onion, carrot, cabbage, apple, pepper
peel > prepare: potato, carrot, pear, onion, apple
boil > heat: milk, soup, potato, egg, water
taste = try: sauce, stew, cake, cheese, wine, soup
wash = clean: plate, bowl, pan, cup, spoon
serve: soup, salad, stew, pie, steak, omelette
spill: milk, wine, sauce, soup, coffee
order: salad, pizza, wine, coffee, omelette, tea

[travel]
people: tourist, hiker, passenger, backpacker, sailor
places: at the airport, near the harbour = close to the harbour, at the station, in the old town
pack ! unpack: backpack, trunk, bag, suitcase
lose ! find: passport, ticket, wallet, umbrella, map, camera
visit = tour: castle, museum, island, temple, cathedral
miss ! catch: train, ferry, plane, bus
book = reserve ! cancel: room, seat, flight, table, cabin
rent = hire: car, boat, tent, cabin, bicycle
photograph: castle, statue, bridge, mountain, waterfall, temple
cross: river, desert, valley, bridge, border
carry ! drop: suitcase, tent, bag, lamp, backpack
study = examine > look at: map, timetable, statue, ticket, menu

[sport]
people: runner, swimmer, goalkeeper, boxer, cyclist, skier
places: at the stadium, in the gym, on the beach, at the club
win ! lose: match, race, tournament, medal, final
throw = toss ! catch: ball, disc, stone, frisbee
lift = raise ! lower: trophy, flag, barbell, sail
cancel = call off: match, race, game, tournament
watch > see: race, game, final, match
repair = fix = mend ! break: racket, helmet, bicycle, ski, net
kick > hit: ball, door, post, wall, box
hide ! show: medal, trophy, injury, helmet, uniform
wear ! take off: helmet, uniform, jacket, cap, scarf

[office]
people: secretary, manager, accountant, clerk, lawyer
places: in the office, in the meeting room, at home, at the bank
write = draft ! read: letter, report, contract, speech, email
sign: contract, cheque, form, letter, petition
send ! receive: letter, parcel, invoice, report, email
accept = approve ! reject = turn down: offer, proposal, plan, budget
copy = duplicate: report, form, file, letter, invoice
postpone = delay = put off: meeting, interview, conference, presentation
delete = erase ! save: file, photo, message, document, email
start = begin ! finish = complete: project, survey, presentation, interview
explain = clarify: plan, rule, contract, budget, proposal
shred > destroy ! keep: invoice, letter, report, form, file

[music]
people: violinist, drummer, singer, pianist, guitarist
places: in the studio, at the festival, in the church, in the concert hall
play = perform: song, sonata, waltz, ballad, march
compose = write: symphony, song, opera, waltz, ballad
tune: guitar, violin, piano, harp, cello
record = tape: song, symphony, concert, march, ballad
buy = purchase ! sell: guitar, drum, flute, trumpet, piano
rehearse = practise: symphony, opera, march, song, sonata
hum > sing: song, tune = melody, ballad, lullaby
smash > break ! repair = fix: guitar, drum, trumpet, microphone, violin
love = adore ! hate = detest: opera, sonata, tune, concert, waltz

[school]
people: teacher, professor, tutor, boy, girl
places: in the classroom, in the library, at the university, in the playground
solve = work out: equation, riddle, puzzle, problem
forget ! remember: poem, answer, rule, formula, name
pass ! fail: test, exam, course, quiz
sketch > draw: map, tree, horse, statue, castle
borrow ! return = bring back: novel, atlas, magazine, dictionary
open ! close = shut: window, door, box, gate, drawer
correct > check: essay, test, translation, exercise
read ! write: poem, story, essay, article, novel
learn = memorise: poem, rule, song, formula, speech

[hospital]
people: nurse, surgeon, dentist, paramedic, pharmacist
places: in the hospital, in the ambulance, at the clinic, in the waiting room
bandage > treat: wound, knee, ankle, hand, elbow
examine = inspect > look at: tooth, knee, wound, ear, eye
swallow ! spit out: pill = tablet, vitamin, syrup, medicine
sterilise > clean: needle, scalpel, thermometer, syringe
push ! pull: trolley, wheelchair, bed, cart
remove = take out ! insert: needle, tube, stitch, syringe
hide ! reveal = disclose: result, error, diagnosis, fee
lock ! unlock: cabinet, door, drawer, gate

[farm]
people: farmer, gardener, shepherd, forester
places: in the field, in the barn, behind the house, in the orchard
plant ! dig up: rose, oak, bush, apple tree, tulip
feed: goat, hen, cow, pig, horse
pick = harvest: pear, cherry, tomato, grape, plum
build = construct ! demolish = tear down: shed, fence, wall, hut, barn
repair = fix = mend ! damage: tractor, fence, plough, gate, roof
load ! unload: truck = lorry, cart, van, trailer
groom > clean: horse, cow, goat, pony, donkey
sell ! buy = purchase: cow, tractor, pig, pony, goat
free = release ! catch: pig, donkey, hen, pony, goose

[workshop]
people: plumber, electrician, carpenter, mechanic, painter
places: in the garage, in the basement, on the roof, in the attic
repair = fix = mend ! break: tap, engine, lamp, chair, pump
install = put in ! remove = take out: heater, sink, lock, alarm
paint: wall, ceiling, cupboard, door, fence
assemble = put together ! dismantle = take apart: shelf, bed, desk, cupboard, engine
measure: window, floor, beam, wall, door
polish > clean: floor, mirror, car, table, lamp
smash = shatter > break: vase, window, mirror, plate
move = shift: sofa, desk, piano, heater, cupboard
switch on = turn on ! switch off = turn off: heater, lamp, pump, alarm, drill

[weather]
people: storm, flood, hurricane, earthquake, landslide
places: on the coast, in the valley, in the north, on the island
destroy > damage: bridge, village, school, church, mill
bury = cover: road, hut, railway, garden
block = obstruct: tunnel, road, railway, path
strike = hit: town, farm, city, port, village
wreck > damage: boat, roof, fence, greenhouse, mill
interrupt = disrupt: match, concert, meeting, race, festival

[animals]
people: dog, cat, fox, horse, crow
places: in the park, in the yard, beside the river = next to the river, under the bridge
chase = pursue > follow: rabbit, duck, mouse, squirrel, hen
devour > eat: biscuit, sausage, apple, pear, fish
frighten = scare: duck, lamb, goose, pony
guard = protect: gate, lamb, nest, house
notice = spot ! overlook: snake, lizard, frog, beetle, mouse
drop ! pick up: stick, ball, bone, glove, nut
sniff > smell: rose, shoe, bone, cheese, sausage

[shop]
people: cashier, manager, boy, girl, tourist
places: in the shop = in the store, at the market, in the town centre, in the mall
buy = purchase ! sell: shirt, sofa, necklace, watch, jacket
steal > take: ring, wallet, watch, bracelet, phone
wrap ! unwrap: present = gift, vase, doll, necklace
choose = select ! reject: scarf, carpet, ring, jacket, dress
lose ! find: phone, glove, ring, key, purse
praise = compliment ! criticise: dress, sofa, carpet, hat, shirt
hang up ! take down: poster, mirror, clock, curtain
tear = rip ! mend = repair: dress, shirt, curtain, poster, glove
"""

CLASSES = """
vegetable: mushroom, potato, onion, carrot, cabbage, pepper, tomato
fruit: apple, pear, cherry, grape, plum
dish: soup, stew, salad, omelette, pizza
drink: milk, water, wine, coffee, tea
dessert: cake, tart, pie, biscuit = cookie
piece of tableware: plate, bowl, cup, spoon
piece of luggage: backpack = rucksack, trunk, bag, suitcase
building: castle, museum, temple, cathedral, church, school, barn, shed, hut, house, mill
vehicle: car, bus, truck, van, tractor, train, bicycle = bike, plane = aeroplane
competition: match, race, tournament, final, game
instrument: guitar, violin, piano, harp, cello, drum, flute, trumpet
piece of music: song, sonata, waltz, ballad, march, symphony, opera, tune, lullaby
document: letter, report, contract, form, invoice, cheque, file, email, petition
animal: goat, hen, cow, pig, horse, pony, donkey, sheep, rabbit, duck, mouse, squirrel, lamb, goose
reptile: snake, lizard
plant: rose, oak, bush, apple tree, tulip
piece of furniture: chair, shelf, bed, desk, cupboard, table, sofa
garment: shirt, jacket, dress, scarf, hat, glove, cap, uniform
piece of jewellery: necklace, watch, ring, bracelet
book: novel, atlas, dictionary
medical tool: needle, scalpel, thermometer, syringe
body part: knee, ankle, hand, elbow, tooth, ear, eye
settlement: village, town, city
musician: violinist, drummer, singer = vocalist, pianist, guitarist
athlete: runner, swimmer, goalkeeper = goalie, boxer, cyclist, skier
traveller: tourist, hiker, passenger, backpacker
office worker: secretary, manager, accountant, clerk
craftsman: plumber, electrician, carpenter, mechanic, painter
educator: teacher, professor, tutor
child: boy, girl
medical worker: nurse, surgeon, dentist, paramedic, pharmacist = chemist
natural disaster: storm, flood, hurricane, earthquake, landslide
employee: chef, baker, waiter, cashier, butcher
farm worker: shepherd, farmer, gardener
"""

# Qualities that exclude each other, and what they are said of: a class, or a noun.
QUALITIES = """
big = large, small = little: vegetable, fruit, piece of luggage, building, animal, plant, \
piece of furniture, settlement, window, gate, door, box, fence, mirror, bridge, boat, tent, wound, \
snake, lizard, fish, sausage, steak, trophy, statue, parcel
young, old = elderly: musician, athlete, traveller, office worker, craftsman, educator, \
medical worker, employee, farm worker, sailor, lawyer, forester
tall, short: child, traveller, athlete, musician, educator, craftsman, farm worker
famous = well-known, unknown: musician, novel, athlete, opera, song, symphony, statue
hot, cold: dish, drink
cheap = inexpensive, expensive = costly: garment, piece of jewellery, instrument, vehicle, \
piece of tableware, camera, room, cabin, phone, carpet, racket
red, green, blue, white, black: garment, vehicle, door, wall, curtain, vase, fence, \
umbrella, ball, flag, backpack, cup
long = lengthy, short = brief: document, competition, piece of music, poem, speech, essay, story, \
meeting, interview, presentation, conference, concert, article, message
simple = easy, difficult = hard: equation, riddle, puzzle, problem, test, exam, quiz, rule, \
translation, exercise, formula, course
strong = powerful, weak: natural disaster
tame, wild: dog, cat, fox, horse, crow, rabbit, goose, duck
"""

TIMES = (
    ("in the morning", "in the evening", "at night"),
    ("on Monday", "on Thursday", "on Sunday"),
    ("in spring", "in autumn", "in winter"),
    ("before lunch", "after lunch"),
    ("last week", "last month", "last year"),
)

# Said of two people: synonyms; whether the reverse says the same; the converse, if any.
THANKING = (
    ("thanked",),
    ("helped", "assisted"),
    ("phoned", "called"),
    ("warned",),
    ("followed",),
    ("invited",),
    ("blamed",),
    ("praised", "complimented"),
    ("interrupted",),
    ("trusted",),
)
MEETING = (
    ("argued with", "quarrelled with"),
    ("shared a room with",),
    ("lived next to", "lived beside"),
    ("danced with",),
    ("played chess against",),
    ("worked with",),
)
# What passes from one person to another: "sold the horse to" is "bought the horse from".
GIVING = (
    ("sold", "bought"),
    ("lent", "borrowed"),
    ("gave", "got"),
    ("sent", "received"),
)
GIFTS = ("camera", "guitar", "umbrella", "necklace", "novel", "bicycle", "ring", "lamp", "watch")
COMPARISONS = (
    ("taller than", "shorter than"),
    ("older than", "younger than"),
    ("richer than", "poorer than"),
    ("faster than", "slower than"),
    ("stronger than", "weaker than"),
)

MASS = frozenset(
    ["milk", "water", "wine", "coffee", "tea", "soup", "cheese", "sauce", "medicine", "syrup"]
)
IRREGULAR_PLURALS = {
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "sheep": "sheep",
    "fish": "fish",
    "tooth": "teeth",
    "shelf": "shelves",
    "craftsman": "craftsmen",
}
# Base, past, participle.
IRREGULAR_VERBS = """
begin began begun, break broke broken, bring brought brought, build built built,
buy bought bought, catch caught caught, choose chose chosen, cut cut cut, dig dug dug,
draw drew drawn, eat ate eaten, feed fed fed, find found found, forget forgot forgotten,
hang hung hung, hide hid hidden, hit hit hit, keep kept kept, lose lost lost, make made made,
put put put, read read read, see saw seen, sell sold sold, send sent sent, show showed shown,
shut shut shut, sing sang sung, spill spilled spilled, spit spat spat, steal stole stolen,
strike struck struck, take took taken, tear tore torn, throw threw thrown, wear wore worn,
win won won, write wrote written
"""
DOUBLED = frozenset(
    ["chop", "cancel", "rip", "shred", "drop", "hum", "plan", "spot", "wrap", "unwrap"]
)
