INSERT INTO volatile (worker) VALUES (:client_id);
UPDATE volatile SET seen = clock_timestamp(), dice = random() WHERE id = (SELECT max(id) FROM volatile WHERE worker = :client_id);
