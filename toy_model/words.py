"""Names of the toy world: each one is a single token of CLIP's vocabulary."""

CHARACTER_NAMES = """
james mary john linda robert susan michael karen william nancy david lisa richard betty joseph
helen thomas sandra charles donna chris daniel ruth matthew sharon anthony laura sarah donald
paul jessica steven anna andrew angela kenneth emma george joshua olivia kevin brian edward
sophie ronald timothy jason jeffrey ryan jacob gary amy nicholas eric kathy jonathan stephen
larry justin scott brandon emily benjamin samuel gregory alexander patrick raymond dennis jerry
tyler aaron adam nathan henry douglas zachary peter kyle ethan walter noah jeremy keith roger
terry sean gerald carl harold arthur lawrence jesse bryan billy bruce joe logan alan juan albert
willie elijah wayne randy vincent roy ralph bobby russell bradley philip eugene alice julia
danielle diana natalie brittany sofia isabella charlotte mia amelia evelyn abigail avery aria
penelope chloe layla riley zoey nora lily eleanor hannah addison aubrey natalia zoe leah audrey
claire lucy caroline samantha maya naomi elena ariana allison cora eva hailey valentina quinn
sadie lydia alexa josephine emery julie jane kate katie molly megan jenny jill tina wendy tara
erin kelly tracy stacy leslie leo oscar felix hugo otto ivan igor boris sven lars finn liam owen
luke isaac gabriel caleb levi asher ezra jonah micah simon marco mario luigi pedro pablo diego
carlos luis miguel rafael fernando sergio antonio enrique javier andres manuel ricardo eduardo
roberto ravi amit anil sanjay vijay arjun rohan priya anita neha ali omar hassan ahmed yusuf
ibrahim karim tariq fatima aisha leila zara nadia amina yuki hiro sakura akira tom tim jim ben
sam dan ken fred greg jeff mike nick rick steve tony todd chad brad kurt karl hans fritz klaus
pierre jacques marie rene luc remy andre yves henri dora nina rita vera zelda wanda greta heidi
ingrid astrid
""".split()

STYLE_NAMES = """
picasso monet warhol rembrandt dali matisse munch raphael miro pollock hopper banksy disney
leonardo michelangelo bosch whistler sargent constable blake mucha ghibli tolkien wes burton
kubrick tarantino nolan spielberg bach mozart chopin wagner verdi beethoven darwin newton
einstein tesla edison galileo shakespeare
""".split()
