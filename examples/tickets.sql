-- A sample table of support tickets.
DROP TABLE IF EXISTS tickets;
CREATE TABLE tickets (id int PRIMARY KEY, product text NOT NULL, body text NOT NULL);
INSERT INTO tickets VALUES
(1, 'router', 'Since the update on Monday the router restarts every night at about three o''clock. I have reset it twice and changed the power supply. My daughter works from home early in the morning and has no connection until half past three.'),
(2, 'router', 'The new router arrived without the power cable. The box was sealed. Please send the cable, I do not want to return everything.'),
(3, 'thermostat', 'The thermostat shows 21 degrees, but two other thermometers in the room show 17. It has been like this since the battery was changed last week.'),
(4, 'thermostat', 'I would like to move the thermostat to the new flat. Do I have to delete the old home in the app first, or will it find the new heating by itself?'),
(5, 'camera', 'The garden camera records nothing between eight in the evening and six in the morning. In the day everything works. The night mode is switched on.'),
(6, 'camera', 'You charged me twice for the yearly camera plan, once on the 3rd and once on the 5th. Please pay one of them back and confirm by mail.'),
(7, 'speaker', 'The speaker in the kitchen answers every time somebody on television says a word that sounds like its name. Can the name be changed?'),
(8, 'speaker', 'After moving the speaker to the bathroom the sound is dull and cuts out every few minutes. The router is two rooms away.');
